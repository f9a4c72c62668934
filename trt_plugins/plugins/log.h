// Errors of the plugin go to the logger of the engine or builder that called it, as TensorRT's logger finder names it.
#pragma once

#include <NvInferRuntime.h>

namespace flamingo {

// nullptr: no finder. TensorRT owns it.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// As printf; to stderr where there is no logger. Returns false, so a check can end with `return refuse(...)`.
__attribute__((format(printf, 1, 2))) bool refuse(const char* format, ...) noexcept;        // in the name of PhiCrossAttention
__attribute__((format(printf, 1, 2))) bool refuse_range(const char* format, ...) noexcept;  // of PhiRangeCrossAttention

using Refuse = bool (*)(const char* format, ...) noexcept;

}  // namespace flamingo
