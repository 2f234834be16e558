"""Makes the real decoder: a pretrained language model and a pretrained vision trunk, joined by a projector of ours."""
