"""From a pretrained model to one that follows instructions and preferences; one file an algorithm.

Read stage (how every one of them opens and closes) and sft first; then reward_model, rollouts (what PPO and GRPO share)
and ppo; grpo with reward_function (the user's own); dpo, then kto; distillation; classify (labels in
place of preferences). log_probabilities is their arithmetic;
lora_export makes plain models of adapters, and lora is its former name;
transformers_names says what our weights are called in Hugging Face `transformers`.
"""
