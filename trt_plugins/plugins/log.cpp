#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace flamingo {

static std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

static nvinfer1::ILogger* find_logger() noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder;
    if (!finder) return nullptr;
    try {
        return finder->findLogger();
    } catch (...) {  // findLogger may throw; no exception leaves this library
        return nullptr;
    }
}

static bool report(const char* plugin, const char* format, va_list values) noexcept {
    char text[512];
    const int prefix = std::snprintf(text, sizeof text, "flamingo::%s: ", plugin);
    std::vsnprintf(text + prefix, sizeof text - prefix, format, values);
    if (nvinfer1::ILogger* logger = find_logger())
        logger->log(nvinfer1::ILogger::Severity::kERROR, text);
    else
        std::fprintf(stderr, "%s\n", text);
    return false;
}

bool refuse(const char* format, ...) noexcept {
    va_list values;
    va_start(values, format);
    report("PhiCrossAttention", format, values);
    va_end(values);
    return false;
}

bool refuse_range(const char* format, ...) noexcept {
    va_list values;
    va_start(values, format);
    report("PhiRangeCrossAttention", format, values);
    va_end(values);
    return false;
}

}  // namespace flamingo
