"""What is compiled on the machine that runs it, and what takes its place where there is no compiler.

machine.native_code makes functions of the C files; layout.h describes structs for it, and prebuilt compiles all of them
beforehand, for an image. In order: the products with the weights: int4_weights (two of them in a byte), int4_tiles (as
a GPU reads them), int8_weights (a byte each, and the layer that training has them in), linear_products (the ways to
compute one, the first of them linear_products.c, int4_products.h and amx_products.h), fastest_way (which is taken),
gpu_products (those of a GPU), linear_layers (the modules that do so). expert_products (products that do not wait to
know which expert gets how many rows, also for training) and stacked_experts (modules of them).
paged_attention (attention to the engine's cache). known_parts (which models decoder_step can compute) and decoder_step
(their whole forward pass in one call, of all C files).
"""
