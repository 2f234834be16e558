"""What the codec's choices cost in attention under text queries (scripts/codec_study): measure (the error), ways (what is compared)."""
