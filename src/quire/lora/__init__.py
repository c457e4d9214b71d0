"""LoRA adapters: folders that peft writes, their names, and the slots that hold the adapters in use."""
