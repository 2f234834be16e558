"""What this project is pinned to. Change these together: the patches are written for exactly this llama.cpp."""

LLAMA_CPP_PYTHON = "0.3.36"
SDIST_NAME = f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

# the llama.cpp inside that source distribution (vendor/llama.cpp)
LLAMA_CPP_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
LLAMA_CPP_REV = LLAMA_CPP_COMMIT[:9]

# a checkout given with --source is this commit, unpatched, if these files are these
IDENTITY = {
    "include/llama.h": "d5cf9203bea63b575e76cba4881f29cfd1b611451578b01582b75b72ecbb04bc",
    "ggml/include/ggml.h": "12ee71f99db7db9b353bc02b1fbb57c344ee17c01ac5fb7952b41a637a747ea9",
    "src/CMakeLists.txt": "6602fed62f13557db0888ccf2fc69b5c49a01f1eea56a9a0c866e8e60084d5d2",
    "src/llama-context.cpp": "928af0777098a53934162f9e0017000bab1f31f799e3db3870323f80d8db2236",
    "src/llama-graph.cpp": "8d0991528a090a266ee8733ff385d40debe9bbda9c7cdc9084d14445bbeebf5b",
    "src/llama-kv-cache.cpp": "ef2804dabbf481640bdf47c0613443bc37e8da8e379401562ef07191175b3f43",
    "tools/mtmd/mtmd.h": "b0f1ba884e8688980789f0547147d2b7330d65772ebac8f36c0dbb8ece7cf7d0",
}

REQUIREMENTS = ["numpy", "gguf", "huggingface-hub", "pillow>=11.3", "jinja2", "tqdm", "typing-extensions", "diskcache",
                "uvicorn>=0.30", "httpx2", "pytest", "hypothesis", "pycparser", "hatchling>=1.26"]
TRAIN_REQUIREMENTS = ["torch==2.13.0", "safetensors>=0.4", "onnx>=1.16", "pypdfium2>=4.30"]  # the last two for scripts/real_decoder
# for the tests of the servers only: what llama-cpp-python's extra `server` names, and the client that most people use
SERVER_REQUIREMENTS = ["openai>=1.50", "fastapi>=0.100.0", "uvicorn>=0.22.0", "sse-starlette>=1.6.1", "starlette-context>=0.3.6,<0.4", "pydantic-settings>=2.0.1", "PyYAML>=5.1"]
