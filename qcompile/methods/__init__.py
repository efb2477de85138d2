"""What a quantization config says: one file a Hugging Face quant_method."""
