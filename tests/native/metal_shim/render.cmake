# cmake -DTREE=<ggml/src/ggml-metal> -DOUT=<folder> -P render.cmake: what capsule.cmake makes of the Metal source, without a target
foreach(name target_sources target_include_directories target_compile_definitions set_property option)
    cmake_language(EVAL CODE "function(${name})\nendfunction()")
endforeach()

set(GGML_METAL_CAPSULE ON)
set(CMAKE_CURRENT_SOURCE_DIR ${TREE})
set(CMAKE_CURRENT_BINARY_DIR ${OUT})
include(${TREE}/capsule.cmake)
