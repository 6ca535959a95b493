"""How any of the models is trained: one loop, and its parts.

In order: training_config (the settings that all trainers share), training_loop (the one loop) and two parts of it,
saved_run (what it keeps on the disk) and micro_batches (how many samples memory holds at once), memory_options (what is
set where a model would not fit), optimization (schedules, optimisers, one step), fused_parts (what a CPU computes in
one pass over memory), attention_within_texts (a GPU's, of packed rows), run_log (metrics and curves), expert_use (which
experts a mixture uses), run_folder (what an earlier run left), run_identity (what a result depends on, so that a run is
continued as what it was), interruptions (how a run ends well). Over several processes: ranks (which one am I),
tensor_plan (how a layer's matrices are cut), parallel_model (how a model is spread), pipeline_stages (consecutive
layers on consecutive ranks).
"""
