// What surrounds the core network on a GPU: prepare.py and upsampling.py, a thread per pixel, for a batch at once.
//
// Images of a batch have one padded size, and places of that size each, whatever their own; `sizes` has the height and
// width of each. Indices within one plane are 32-bit, as no plane has 2^31 elements (MOST_PIXELS in lane.py); what
// leads from plane to plane or image to image is 64-bit.
//
// No shared memory and no warp intrinsics, so that the same source compiles for the host, where the tests run it.
// Compiled without fused multiply-add: the results are those of NumPy, which rounds every product.

typedef unsigned char uint8;
typedef unsigned short uint16;

// float16 by its bits: the header that defines it is not at hand wherever this is compiled.
struct float16 {
    uint16 bits;
};

union FloatBits {
    float value;
    unsigned int bits;
};

__device__ inline float to_float(float value) { return value; }

__device__ inline float to_float(float16 value) {
    unsigned int sign = (unsigned int)(value.bits & 0x8000u) << 16;
    unsigned int exponent = value.bits >> 10 & 31u, fraction = value.bits & 1023u;
    FloatBits result;
    if (exponent == 0) {  // zero, or a subnormal: fraction · 2⁻²⁴, which float32 holds exactly
        result.value = (float)fraction * 5.9604644775390625e-8f;
        result.bits |= sign;
    } else {
        result.bits = sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
    }
    return result.value;
}

__device__ inline void store(float* out, float value) { *out = value; }

// Rounds to the nearest, ties to even, as NumPy does.
__device__ inline void store(float16* out, float value) {
    FloatBits from;
    from.value = value;
    uint16 sign = (uint16)(from.bits >> 16 & 0x8000u);
    unsigned int magnitude = from.bits & 0x7fffffffu;
    unsigned int rounded;
    if (magnitude > 0x7f800000u) {
        rounded = 0x7e00u;  // NaN
    } else if (magnitude >= 0x477ff000u) {
        rounded = 0x7c00u;  // from 65520 on: infinity
    } else if (magnitude < 0x38800000u) {  // below 2⁻¹⁴: whole multiples of 2⁻²⁴
        FloatBits shifted;
        shifted.bits = magnitude;
        shifted.value += 0.5f;  // the sum's last bit is worth 2⁻²⁴
        rounded = shifted.bits - 0x3f000000u;
    } else {
        rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
        rounded = (rounded - 0x38000000u) >> 13;
    }
    out->bits = (uint16)(sign | rounded);
}

// Images, [height, width, channels] each, as the core's input, [N, channels, padded_height, padded_width]: value · scale -
// shift by channel; the padding, right and bottom, is zero.
template <typename Image, typename Input>
__device__ inline void prepare(const int* sizes, const Image* images, Input* out, const float* scale, const float* shift,
                               unsigned int channels, unsigned int padded_height, unsigned int padded_width) {
    unsigned int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= padded_width || y >= padded_height) return;
    unsigned int height = (unsigned int)sizes[2 * blockIdx.z], width = (unsigned int)sizes[2 * blockIdx.z + 1];
    unsigned int plane = padded_height * padded_width;
    size_t first = (size_t)plane * channels * blockIdx.z;
    bool inside = x < width && y < height;
    const Image* pixel = images + first + (size_t)(y * width + x) * channels;
    Input* place = out + first + (y * padded_width + x);
    for (unsigned int channel = 0; channel < channels; ++channel, place += plane)
        store(place, inside ? (float)pixel[channel] * scale[channel] - shift[channel] : 0.0f);
}

// Where a row or a column of the labels lies in the scores: between two cells, with a weight for each. Computed once per
// padded size, by places.py.
struct alignas(16) Place {
    int first, second;
    float near, far;
};

// Scores, [N, classes, cells], to the best class of each cell, [N, cells]; of one score whether it is above `threshold`.
template <typename Score, typename Label>
__device__ inline void best(const Score* scores, Label* winners, unsigned int classes, unsigned int cells,
                            unsigned int single, float threshold) {
    unsigned int cell = blockIdx.x * blockDim.x + threadIdx.x;
    if (cell >= cells) return;
    const Score* score = scores + (size_t)cells * classes * blockIdx.z + cell;
    float most = threshold;
    unsigned int winner = 0;
    for (unsigned int entry = 0; entry < classes; ++entry, score += cells) {
        float value = to_float(*score);
        if (value > most || (entry == 0 && !single)) {
            most = value;
            winner = entry + single;
        }
    }
    winners[(size_t)cells * blockIdx.z + cell] = (Label)winner;
}

// A score between four cells. `even`: every cell holds equally many pixels, and argmax.py adds in another order then.
__device__ inline float between(float top_left, float top_right, float bottom_left, float bottom_right, Place row,
                                Place column, unsigned int even) {
    float left = top_left * row.near + bottom_left * row.far;
    float right = top_right * row.near + bottom_right * row.far;
    return even ? left * column.near + right * column.far : left + (right - left) * column.far;
}

// Uncropped scores, [N, classes, rows, columns], and the best class of each cell to the labels of each image, [height,
// width]. Interpolation is a convex combination: where four cells have the same best class, so has every pixel between
// them, and the scores are not read. Full-size scores exist a pixel at a time only.
template <typename Score, typename Label>
__device__ inline void label(const int* sizes, const Place* places, const Score* scores, const Label* winners,
                             Label* labels, unsigned int classes, unsigned int rows, unsigned int columns,
                             unsigned int padded_height, unsigned int padded_width, unsigned int even,
                             unsigned int single, float threshold) {
    unsigned int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    unsigned int height = (unsigned int)sizes[2 * blockIdx.z], width = (unsigned int)sizes[2 * blockIdx.z + 1];
    if (x >= width || y >= height) return;
    Place row = places[y], column = places[padded_height + x];
    unsigned int cells = rows * columns;
    unsigned int top = (unsigned int)row.first * columns, bottom = (unsigned int)row.second * columns;
    unsigned int top_left = top + (unsigned int)column.first, top_right = top + (unsigned int)column.second;
    unsigned int bottom_left = bottom + (unsigned int)column.first, bottom_right = bottom + (unsigned int)column.second;
    winners += (size_t)cells * blockIdx.z;
    unsigned int winner = winners[top_left];
    if (winner != winners[top_right] || winner != winners[bottom_left] || winner != winners[bottom_right]) {
        const Score* score = scores + (size_t)cells * classes * blockIdx.z;
        float most = between(threshold, threshold, threshold, threshold, row, column, even);
        winner = 0;
        for (unsigned int entry = 0; entry < classes; ++entry, score += cells) {
            float value = between(to_float(score[top_left]), to_float(score[top_right]), to_float(score[bottom_left]),
                                  to_float(score[bottom_right]), row, column, even);
            if (value > most || (entry == 0 && !single)) {
                most = value;
                winner = entry + single;
            }
        }
    }
    labels[(size_t)(padded_height * padded_width) * blockIdx.z + (y * width + x)] = (Label)winner;
}

// A name says which release's arguments a kernel takes: an engine that has kernels of another one lacks it.
#define PREPARE_ARGUMENTS(Image, Input)                                                               \
    const int *sizes, const Image *images, Input *out, const float *scale, const float *shift,        \
        unsigned int channels, unsigned int padded_height, unsigned int padded_width
#define PREPARE prepare(sizes, images, out, scale, shift, channels, padded_height, padded_width)

extern "C" __global__ void prepare_batch_uint8_float32(PREPARE_ARGUMENTS(uint8, float)) { PREPARE; }
extern "C" __global__ void prepare_batch_uint16_float32(PREPARE_ARGUMENTS(uint16, float)) { PREPARE; }
extern "C" __global__ void prepare_batch_int16_float32(PREPARE_ARGUMENTS(short, float)) { PREPARE; }
extern "C" __global__ void prepare_batch_float32_float32(PREPARE_ARGUMENTS(float, float)) { PREPARE; }
extern "C" __global__ void prepare_batch_uint8_float16(PREPARE_ARGUMENTS(uint8, float16)) { PREPARE; }
extern "C" __global__ void prepare_batch_uint16_float16(PREPARE_ARGUMENTS(uint16, float16)) { PREPARE; }
extern "C" __global__ void prepare_batch_int16_float16(PREPARE_ARGUMENTS(short, float16)) { PREPARE; }
extern "C" __global__ void prepare_batch_float32_float16(PREPARE_ARGUMENTS(float, float16)) { PREPARE; }

#define BEST_ARGUMENTS(Score, Label)                                                                  \
    const Score *scores, Label *winners, unsigned int classes, unsigned int cells, unsigned int single, \
        float threshold
#define BEST best(scores, winners, classes, cells, single, threshold)

extern "C" __global__ void best_of_cells_float32_uint8(BEST_ARGUMENTS(float, uint8)) { BEST; }
extern "C" __global__ void best_of_cells_float32_uint16(BEST_ARGUMENTS(float, uint16)) { BEST; }
extern "C" __global__ void best_of_cells_float16_uint8(BEST_ARGUMENTS(float16, uint8)) { BEST; }
extern "C" __global__ void best_of_cells_float16_uint16(BEST_ARGUMENTS(float16, uint16)) { BEST; }

#define LABEL_ARGUMENTS(Score, Label)                                                                 \
    const int *sizes, const Place *places, const Score *scores, const Label *winners, Label *labels,  \
        unsigned int classes, unsigned int rows, unsigned int columns, unsigned int padded_height,    \
        unsigned int padded_width, unsigned int even, unsigned int single, float threshold
#define LABEL                                                                                             \
    label(sizes, places, scores, winners, labels, classes, rows, columns, padded_height, padded_width, even, \
          single, threshold)

extern "C" __global__ void label_batch_float32_uint8(LABEL_ARGUMENTS(float, uint8)) { LABEL; }
extern "C" __global__ void label_batch_float32_uint16(LABEL_ARGUMENTS(float, uint16)) { LABEL; }
extern "C" __global__ void label_batch_float16_uint8(LABEL_ARGUMENTS(float16, uint8)) { LABEL; }
extern "C" __global__ void label_batch_float16_uint16(LABEL_ARGUMENTS(float16, uint16)) { LABEL; }
