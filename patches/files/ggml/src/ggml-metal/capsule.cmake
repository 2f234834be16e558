# GGML_OP_CAPSULE on Metal: written without a Mac, hence off

option(GGML_METAL_CAPSULE "ggml: capsule kernels on Metal (experimental, never run so far)" OFF)

if (GGML_METAL_CAPSULE)
    set(CAPSULE_SOURCE "#include <metal_stdlib>\nusing namespace metal;\n")
    foreach(name
            ../ggml-capsule-impl.h ../ggml-capsule-mma.h ../ggml-capsule-tile.h ../ggml-capsule-unpack.h
            ../ggml-capsule-cells.h ../ggml-capsule-put.h ../ggml-capsule-encode.h
            ../ggml-capsule-query.h ../ggml-capsule-scores.h ../ggml-capsule-attn.h kernels/capsule.metal)
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${name})
        file(READ ${CMAKE_CURRENT_SOURCE_DIR}/${name} text)
        string(REPLACE "#pragma once" "" text "${text}")
        string(REGEX REPLACE "#include \"ggml-capsule-[a-z]+.h\"" "" text "${text}")
        string(APPEND CAPSULE_SOURCE "${text}")
    endforeach()
    file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/ggml-metal-capsule-source.h CONTENT "R\"capsule(${CAPSULE_SOURCE})capsule\"" @ONLY)

    target_sources(ggml-metal PRIVATE ggml-metal-capsule.cpp)
    target_include_directories(ggml-metal PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
    target_compile_definitions(ggml-metal PRIVATE GGML_METAL_CAPSULE)
endif()
