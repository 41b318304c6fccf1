"""The herd: which models there are, their llama-servers, and the memory they need."""
