// Which TensorRT headers the plugin compiles against. IPluginV3 exists since 10.0 and is the same in 11; 9 and earlier have V2 plugins only.
#pragma once

#include <NvInferVersion.h>

#if !defined(NV_TENSORRT_MAJOR)
#error "NvInferVersion.h does not define NV_TENSORRT_MAJOR: these are not TensorRT's headers. Set TENSORRT_ROOT to TensorRT 10 or 11."
#elif NV_TENSORRT_MAJOR != 10 && NV_TENSORRT_MAJOR != 11
#error "The plugin needs the headers of TensorRT 10 or 11 (for TensorRT for RTX too: it loads the same library). Set TENSORRT_ROOT."
#endif
