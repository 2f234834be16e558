#pragma once

#include <filesystem>
#include <string>

#ifdef _WIN32
#    define WIN32_LEAN_AND_MEAN
#    ifndef NOMINMAX
#        define NOMINMAX
#    endif
#    include <windows.h>
#else
#    include <dlfcn.h>
#endif

// The folder of the library (or program) that this is part of. It is found when that is loaded: its name may be relative to the folder that is current then.
static const std::string ggml_backend_own_folder = [] {
    std::error_code ec;
    std::filesystem::path path;
    static const char here = 0;
#ifdef _WIN32
    HMODULE module = nullptr;
    wchar_t name[32768];
    const DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (GetModuleHandleExW(flags, (LPCWSTR) &here, &module) && GetModuleFileNameW(module, name, 32768)) {
        path = name;
    }
#else
    Dl_info info;
    if (dladdr(&here, &info) && info.dli_fname) {
        path = info.dli_fname;
    }
#endif
    return path.empty() ? std::string() : std::filesystem::absolute(path, ec).parent_path().u8string();
}();

// Where backends are looked for: in the folder that was asked for, or else beside ggml, and never in the current folder.
static const char * ggml_backend_folder(const char * asked) {
    return asked || ggml_backend_own_folder.empty() ? asked : ggml_backend_own_folder.c_str();
}
