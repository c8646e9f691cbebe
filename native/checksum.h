// Checksum: 64 bits over a piece of memory, so that damage is noticed. As fast as memory is read; no defence against intent.
//
// Eight lanes take the 64-bit words in turn: lane = rotl(lane ^ word, 29) * odd. A step is a bijection of the word and of the
// lane, and so is the fold of the lanes at the end: a change of one word always changes the sum, any other change misses
// it with a chance of 2^-64. Words are little-endian; a rest of less than 64 bytes is filled up with zeros, which the length,
// a part of the sum, tells from true ones.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace jilju {

inline uint64_t checksum(const uint8_t* data, size_t num_bytes, uint64_t seed) {
    constexpr size_t kLanes = 8, kStripe = 8 * kLanes;
    constexpr uint64_t kOdd = 0xD1B54A32D192ED03u, kStart = 0x9E3779B97F4A7C15u;  // odd, half of the bits set, no pattern
    const auto mix = [](uint64_t h, uint64_t word) { return std::rotl(h ^ word, 29) * kOdd; };

    uint64_t lanes[kLanes];
    for (size_t l = 0; l < kLanes; ++l) lanes[l] = seed + kStart * (l + 1);
    const auto take = [&](const uint8_t* stripe) {
        for (size_t l = 0; l < kLanes; ++l) {
            uint64_t word;
            std::memcpy(&word, stripe + 8 * l, 8);
            lanes[l] = mix(lanes[l], word);
        }
    };
    size_t offset = 0;
    for (; offset + kStripe <= num_bytes; offset += kStripe) take(data + offset);
    if (offset < num_bytes) {
        uint8_t rest[kStripe] = {};
        std::memcpy(rest, data + offset, num_bytes - offset);
        take(rest);
    }
    uint64_t sum = mix(seed, num_bytes);
    for (const uint64_t lane : lanes) sum = mix(sum, lane);
    sum ^= sum >> 32;
    sum *= kOdd;
    return sum ^ sum >> 29;
}

}  // namespace jilju
