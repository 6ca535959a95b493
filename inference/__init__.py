"""Using a trained model: generation, INT8 weights, the service and its load test.

In order: sampling (logits → token), what the engine stands on (cache_blocks, paged_attention, text_stream, request,
engine_statistics), engine, text_generation (many prompts at once); quantizer, beam_search and kv_cache_infer (the
command line); api_service and load_test. native_code, linear_kernels and decoder_step are what is compiled here;
known_parts says for which models.
"""
