"""kvcapsule-chat: questions about pictures, answered from the compressed cache.

args      command line and its environment twins      files     which mmproj and capsule belong to a model
hub       -hf user/repo                                images    anything Pillow reads, from a path, URL or stdin
engine    model, projector, capsule and context       session   a conversation in the cache
sampling  the chain of llama_sampler                  template  the model's chat template
stats     what the cache holds, in tokens and bytes    repl      the interactive part
"""
