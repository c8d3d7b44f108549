"""Ask a GGUF model in llama.cpp, from the package xllamacpp: python ask_llama_cpp.py MODEL.gguf "a question"."""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 1024
params.verbosity = 0
server = xllamacpp.Server(params)
told = server.handle_chat_completions({"messages": [{"role": "user", "content": sys.argv[2]}], "temperature": 0})
print(told["choices"][0]["message"]["content"])
