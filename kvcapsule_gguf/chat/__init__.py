"""kvcapsule-chat: questions about pictures, answered from the compressed cache.

args      command line and its environment twins      files     which mmproj and capsule belong to a model
hub       -hf user/repo                                fill      brings a prompt into it, evaluating only what is new
engine    model, projector, capsule and context       session   a conversation: questions and answers
contents  what the cache holds                        stats     what the cache holds, in tokens and bytes
prompt    a prompt as chunks of text and pictures     template  the model's chat template
sampling  the chain of llama_sampler                  saved     /save and /load
repl      the interactive part                        progress  lines about pictures and answers at a terminal
"""
