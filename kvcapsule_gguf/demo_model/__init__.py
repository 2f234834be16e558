"""The demo model: a small LLaVA-style VLM of drawn scenes, its training (torch) and its export to GGUF."""
