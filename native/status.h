// Status: how the core reports failure. A code and a sentence; nothing here throws across a boundary or aborts.
#pragma once

#include <string>
#include <utility>

namespace jilju {

struct Status {
    enum Code { kOk = 0, kInvalid = 1, kNoMemory = 2, kUnsupported = 3 };
    Code code = kOk;
    std::string message;

    bool ok() const { return code == kOk; }
    static Status invalid(std::string text) { return {kInvalid, std::move(text)}; }
    static Status no_memory(std::string text) { return {kNoMemory, std::move(text)}; }
    static Status unsupported(std::string text) { return {kUnsupported, std::move(text)}; }
};

}  // namespace jilju
