"""Using a trained model: generation, INT8 weights, the service and its load test.

In order: sampling (logits → token), what the engine stands on (kernels/: all that is compiled; cache_blocks,
paged_cache, text_stream, request, engine_statistics, speculation; on a GPU gpu_cache, gpu_sampling, gpu_step),
tensor_parallel (several processes share a model), model_step (what a step computes), engine (the requests),
text_generation (many prompts at once); error_aware_rounding (to INT4), quantizer, draft_texts (drafts from texts),
draft_model (a small model drafts for a large one), beam_search and kv_cache_infer (the command line); translate
(encoder–decoders); inspect_model (a page on what happens inside);
api_service, its parts in service/, and load_test; chat (a conversation in the terminal).
"""
