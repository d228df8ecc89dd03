// How operations that go row by row cut themselves into chunks.
#pragma once
#include <algorithm>

#include "ops.h"

// A chunk moves about 32 KiB, some µs of work.
inline int64_t row_chunks(int64_t rows, int64_t bytes_per_row) {
    const int64_t by_size = (rows * bytes_per_row + 32767) / 32768;
    return std::min(rows, std::max<int64_t>(by_size, 1));
}

inline int64_t size_of(int32_t dtype) { return dtype == FS_F32 ? 4 : dtype == FS_I8 ? 1 : 2; }
