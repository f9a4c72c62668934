# Finds TensorRT's headers; its libraries are not needed. In this order: TENSORRT_ROOT (cache variable, then environment), system paths, the
# vendor's CMake package. Sets FLAMINGO_TENSORRT_INCLUDE, empty where there are none, and FLAMINGO_TENSORRT_VERSION.
set(TENSORRT_ROOT "" CACHE PATH "Folder of TensorRT, which holds include/NvInferRuntime.h")
set(FLAMINGO_TENSORRT_INCLUDE "")
set(FLAMINGO_TENSORRT_VERSION "")

set(root "${TENSORRT_ROOT}")
if(NOT root)
    set(root "$ENV{TENSORRT_ROOT}")
    if(root)
        get_filename_component(root "${root}" ABSOLUTE BASE_DIR "$ENV{PWD}")  # where the command was given, not where the sources are
    endif()
endif()
if(root)
    # A root that is named and wrong is an error of the user's, not a reason to look elsewhere.
    find_path(include NvInferRuntime.h PATHS "${root}" PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
    if(NOT include)
        message(FATAL_ERROR "TENSORRT_ROOT is ${root}, which has no include/NvInferRuntime.h")
    endif()
else()
    find_path(include NvInferRuntime.h PATHS /usr/local/tensorrt /opt/tensorrt PATH_SUFFIXES include NO_CACHE)
    if(NOT include)
        find_package(TensorRT CONFIG QUIET)
        foreach(target TensorRT::nvinfer TensorRT::TensorRT)
            if(TARGET ${target})
                get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
                find_path(include NvInferRuntime.h PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
            endif()
        endforeach()
        find_path(include NvInferRuntime.h PATHS ${TensorRT_INCLUDE_DIRS} NO_DEFAULT_PATH NO_CACHE)
    endif()
endif()

if(include)
    set(FLAMINGO_TENSORRT_INCLUDE "${include}")
    file(STRINGS "${include}/NvInferVersion.h" lines REGEX "#define (NV_TENSORRT|TRT)_(MAJOR|MINOR)[A-Z_]* +[0-9]+")
    foreach(part MAJOR MINOR)
        string(REGEX MATCH "_${part}[A-Z_]* +([0-9]+)" matched "${lines}")
        list(APPEND FLAMINGO_TENSORRT_VERSION "${CMAKE_MATCH_1}")
    endforeach()
    list(JOIN FLAMINGO_TENSORRT_VERSION "." FLAMINGO_TENSORRT_VERSION)
    message(STATUS "TensorRT headers: ${include} (${FLAMINGO_TENSORRT_VERSION})")
else()
    message(STATUS
        "No TensorRT headers: the plugin is not built. To have it, any one of\n"
        "     - apt install libnvinfer-headers-dev (from NVIDIA's CUDA repository)\n"
        "     - -DTENSORRT_ROOT=folder of the unpacked TensorRT tar\n"
        "     - -DTENSORRT_ROOT=clone of the public repository NVIDIA/TensorRT\n"
        "   pip's TensorRT wheels hold no headers. TensorRT for RTX takes the same plugin, built with the headers of TensorRT 10 or 11.")
endif()
unset(include)
unset(root)
