"""kvcapsule-eval: how much of the model's answers survives a smaller cache, paired and measured in llama.cpp itself.

suites   pictures with questions and answers      settings   the caches that are compared
vlm      model, projector and contexts            prompts    the text around a picture, as tokens
run      the measurement                          intervals  Wilson and bootstrap
report   the table, Markdown and JSON             cli        the command
"""
