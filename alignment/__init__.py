"""From a pretrained model to one that follows instructions and preferences; one file an algorithm.

Read sft first; then reward_model, rollouts (what PPO and GRPO share) and ppo; grpo, dpo and distillation stand each for
itself. log_probabilities is their arithmetic. lora_export makes plain models of adapters; transformers_names says what
our weights are called in Hugging Face `transformers`.
"""
