// Pack: weights of the quantized formats in the order in which the integer kernels read them.
//
// Sixteen rows make a strip, in two halves. Of a half eight rows are interleaved, so that a vector of 32 bytes holds four
// columns of each. Along K a strip is a sequence of blocks of 32 columns, of either half one after the other; of the K formats eight
// blocks follow a head of either half: d float32[8], one a row, then dm float32[8] but for kW6. A half of a block:
//   scales    float16[8]; of kW4K and kW5K uint8[8]; of kW6 int8[2][8], one per 16 columns
//   offsets   of kW4Offset and kW5Offset float16[8]; of kW4K and kW5K uint8[8]; else none
//   quants    byte [l][row][i], l and i in 0..3: column 4l+i in the low nibble, 16+4l+i in the high one. Then of five bits a
//             plane [row][i] whose bit l is the fifth bit of column 4l+i, l in 0..7; of six bits two planes of bit pairs, for l in
//             0..3 and 4..7. kW8: signed byte [l][row][i], l in 0..7, column 4l+i.
// A weight is scale * (q - z), z being 8, 16 or 32 for a format without offsets; scale * q + offset; of kW4K and kW5K
// d * scale * q + dm * offset; of kW6 d * scale * (q - 32); of kW8 scale * q. Nothing is rounded: these are the file's own
// numbers. The last strip is filled up with rows of zeros. Knows no instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace jilju {

inline constexpr const char* kPackedVersion = "r16-1";

// One entry a weight that is packed, in order of weight ids; offsets in one buffer, multiples of 64.
struct PackedEntry {
    int weight;
    int64_t offset, num_bytes;
};
std::vector<PackedEntry> packed_layout(const Program& program);

// `from`: the weight's rows as they lie in the file. `to`: the entry's bytes.
void pack(const Weight& weight, const uint8_t* from, uint8_t* to);

}  // namespace jilju
