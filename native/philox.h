// Philox4x32-10: counter-based noise (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include <array>
#include <cstdint>

namespace jilju {

using Words = std::array<uint32_t, 4>;

[[gnu::always_inline]] inline Words philox4x32_10(Words counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
        counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
                   static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// The uniform number in [0, 1) of a draw: 53 bits of the first two words.
[[gnu::always_inline]] inline double uniform(uint64_t seed, int64_t position) {
    const uint64_t p = static_cast<uint64_t>(position);
    const Words w = philox4x32_10({static_cast<uint32_t>(p), static_cast<uint32_t>(p >> 32), 0, 0}, static_cast<uint32_t>(seed),
                                  static_cast<uint32_t>(seed >> 32));
    const uint64_t bits = (uint64_t{w[0]} << 21 | w[1] >> 11) & ((uint64_t{1} << 53) - 1);
    return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace jilju
