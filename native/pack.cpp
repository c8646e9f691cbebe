#include "pack.h"

#include <cstring>

namespace jilju {
namespace {

// 32 columns of a row: quants, and what they are scaled with, as pack.h names it.
struct Block {
    uint8_t q[kBlockColumns];  // of kW8 signed
    uint16_t half_scale = 0, half_offset = 0;
    int scale[2] = {0, 0}, offset = 0;  // of the K formats
    float d = 0, dm = 0;
};

uint16_t half_bits(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return bits;
}

void nibbles_of(const uint8_t* p, uint8_t* q) {
    for (int i = 0; i < 16; ++i) {
        q[i] = p[i] & 15;
        q[16 + i] = p[i] >> 4;
    }
}
void fifth_bits_of(const uint8_t* p, uint8_t* q) {
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    for (int i = 0; i < 32; ++i) q[i] |= static_cast<uint8_t>((bits >> i & 1) << 4);
}

// The six-bit scale and offset of the j-th 32 columns of Q4_K and Q5_K.
void scales_k(const uint8_t* p, int j, Block* out) {
    const uint8_t* scales = p + 4;
    if (j < 4) {
        out->scale[0] = scales[j] & 63;
        out->offset = scales[4 + j] & 63;
    } else {
        out->scale[0] = (scales[4 + j] & 15) | (scales[j - 4] >> 6) << 4;
        out->offset = scales[4 + j] >> 4 | (scales[j] >> 6) << 4;
    }
    out->d = half_to_float(half_bits(p));
    out->dm = -half_to_float(half_bits(p + 2));
}

// The k-th block of 32 columns of a row.
void read_block(Format format, const uint8_t* row, int64_t k, Block* out) {
    const Layout* layout = layout_of(static_cast<int64_t>(format));
    const int per_block = layout->block_elements / kBlockColumns, j = static_cast<int>(k % per_block);
    const uint8_t* p = row + k / per_block * layout->block_bytes;
    switch (format) {
        case Format::kQ4_0:
            out->half_scale = half_bits(p);
            nibbles_of(p + 2, out->q);
            break;
        case Format::kQ4_1:
            out->half_scale = half_bits(p), out->half_offset = half_bits(p + 2);
            nibbles_of(p + 4, out->q);
            break;
        case Format::kQ5_0:
            out->half_scale = half_bits(p);
            nibbles_of(p + 6, out->q);
            fifth_bits_of(p + 2, out->q);
            break;
        case Format::kQ5_1:
            out->half_scale = half_bits(p), out->half_offset = half_bits(p + 2);
            nibbles_of(p + 8, out->q);
            fifth_bits_of(p + 4, out->q);
            break;
        case Format::kQ8_0:
            out->half_scale = half_bits(p);
            std::memcpy(out->q, p + 2, 32);
            break;
        case Format::kQ4_K:
        case Format::kQ5_K: {
            scales_k(p, j, out);
            const bool five = format == Format::kQ5_K;
            const uint8_t* nibbles = p + (five ? 48 : 16) + j / 2 * 32;
            for (int i = 0; i < 32; ++i) out->q[i] = (j % 2 ? nibbles[i] >> 4 : nibbles[i] & 15) | (five ? (p[16 + i] >> j & 1) << 4 : 0);
            break;
        }
        case Format::kQ6_K: {
            out->d = half_to_float(half_bits(p + 208));
            for (int h = 0; h < 2; ++h) out->scale[h] = static_cast<int8_t>(p[192 + 2 * j + h]);
            const uint8_t* nibbles = p + j / 4 * 64 + j % 2 * 32;
            const uint8_t* high = p + 128 + j / 4 * 32;
            for (int i = 0; i < 32; ++i) out->q[i] = (j % 4 < 2 ? nibbles[i] & 15 : nibbles[i] >> 4) | (high[i] >> 2 * (j % 4) & 3) << 4;
            break;
        }
        default: break;  // not packed
    }
}

template <class T>
void put(uint8_t* to, int index, T value) {
    std::memcpy(to + index * sizeof(T), &value, sizeof(T));
}

void put_quants(Family family, const uint8_t* q, int row, uint8_t* to) {
    if (family == Family::kW8) {
        for (int k = 0; k < kBlockColumns; ++k) to[(k / 4 * kHalfRows + row) * 4 + k % 4] = q[k];
        return;
    }
    for (int k = 0; k < 16; ++k) to[(k / 4 * kHalfRows + row) * 4 + k % 4] = static_cast<uint8_t>((q[k] & 15) | q[16 + k] << 4);
    uint8_t* planes = to + 128;
    const int bits = family == Family::kW6 ? 6 : family == Family::kW4 || family == Family::kW4Offset || family == Family::kW4K ? 4 : 5;
    for (int i = 0; i < 4 && bits > 4; ++i) {
        uint8_t plane[2] = {0, 0};
        for (int l = 0; l < 8; ++l) {
            if (bits == 5) {
                plane[0] |= static_cast<uint8_t>((q[4 * l + i] >> 4) << l);
            } else {
                plane[l / 4] |= static_cast<uint8_t>((q[4 * l + i] >> 4) << 2 * (l % 4));
            }
        }
        planes[row * 4 + i] = plane[0];
        if (bits == 6) planes[32 + row * 4 + i] = plane[1];
    }
}

}  // namespace

std::vector<PackedEntry> packed_layout(const Program& program) {
    std::vector<PackedEntry> out;
    int64_t offset = 0;
    for (size_t i = 0; i < program.weights.size(); ++i) {
        const Weight& w = program.weights[i];
        if (w.family == Family::kFloat) continue;
        const int64_t num_bytes = (w.num_outputs + kStripRows - 1) / kStripRows * w.strip_bytes;
        out.push_back({static_cast<int>(i), offset, num_bytes});
        offset += (num_bytes + 63) / 64 * 64;
    }
    return out;
}

void pack(const Weight& w, const uint8_t* from, uint8_t* to) {
    const FamilyLayout layout = family_layout(w.family);
    const int64_t num_blocks = w.num_inputs / kBlockColumns, num_strips = (w.num_outputs + kStripRows - 1) / kStripRows;
    for (int64_t strip = 0; strip < num_strips; ++strip, to += w.strip_bytes) {
        std::memset(to, 0, static_cast<size_t>(w.strip_bytes));
        for (int row = 0; row < kStripRows && strip * kStripRows + row < w.num_outputs; ++row) {
            const uint8_t* source = from + (strip * kStripRows + row) * w.row_bytes;
            const int half = row / kHalfRows, lane = row % kHalfRows;
            uint8_t* at = to;
            for (int64_t k = 0; k < num_blocks; ++k, at += 2 * layout.block_bytes) {
                Block block;
                read_block(w.format, source, k, &block);
                if (layout.head_bytes && k % kHeadBlocks == 0) {
                    uint8_t* head = at + half * layout.head_bytes;
                    put(head, lane, block.d);
                    if (w.family != Family::kW6) put(head, kHalfRows + lane, block.dm);
                    at += 2 * layout.head_bytes;
                }
                uint8_t* p = at + half * layout.block_bytes;
                switch (w.family) {
                    case Family::kFloat: break;
                    case Family::kW4Offset:
                    case Family::kW5Offset: put(p, kHalfRows + lane, block.half_offset); [[fallthrough]];
                    case Family::kW4:
                    case Family::kW5:
                    case Family::kW8: put(p, lane, block.half_scale); break;
                    case Family::kW4K:
                    case Family::kW5K:
                        put(p, lane, static_cast<uint8_t>(block.scale[0]));
                        put(p, kHalfRows + lane, static_cast<uint8_t>(block.offset));
                        break;
                    case Family::kW6:
                        for (int h = 0; h < 2; ++h) put(p, h * kHalfRows + lane, static_cast<int8_t>(block.scale[h]));
                        break;
                }
                put_quants(w.family, block.q, lane, p + layout.scale_bytes);
            }
        }
    }
}

}  // namespace jilju
