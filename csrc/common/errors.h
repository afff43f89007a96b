// Return codes of every exported function: 0, or a negative code that native turns into a sentence.
#pragma once

namespace entrenar {

enum Error : int {
    kOk = 0,
    kBadSize = -1,         // a count or a dimension is negative, or a product of sizes overflows
    kBufferTooSmall = -2,  // a buffer holds fewer bytes than the sizes ask for
    kBadBlockSize = -3,    // a block size that is not allowed
    kNullPointer = -4,     // a null buffer with a size that is not 0
    kBadDtype = -5,        // not one of common/floats.h's Dtype
    kBadPath = -6,         // a path that does not exist or that this CPU cannot run
    kBadArgument = -7,     // anything else that is out of range
    kNoMemory = -8,        // scratch could not be allocated
};

}  // namespace entrenar
