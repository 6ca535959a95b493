"""Models come in and go out.

In order: sources (what comes in, as a checkpoint's weights), hugging_face (folders in); outgoing (what goes out, and
where to), gguf_tokenizer, gguf_int4 (its 4-bit weights) and gguf_files (GGUF in and out), peft_adapters (LoRA in),
import_model (the command);
modelfile and model_card (what stands beside a model that goes out), export_model (folders out; the command).
"""
