// What surrounds the core network on a GPU: prepare.py and head.py, a thread per pixel.
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

// An image, [height, width, channels], as the core's input, [channels, padded_height, padded_width]: value · scale -
// shift by channel; the padding, right and bottom, is zero.
template <typename Image, typename Input>
__device__ inline void prepare(const Image* image, Input* out, const float* scale, const float* shift, int channels,
                               int height, int width, int padded_height, int padded_width) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= padded_width || y >= padded_height) return;
    bool inside = x < width && y < height;
    const Image* pixel = image + ((size_t)y * width + x) * channels;
    Input* place = out + (size_t)y * padded_width + x;
    for (int channel = 0; channel < channels; ++channel) {
        float value = inside ? (float)pixel[channel] * scale[channel] - shift[channel] : 0.0f;
        store(place + (size_t)channel * padded_height * padded_width, value);
    }
}

// How an axis of the scores becomes an axis of the labels: a Resize as ONNX defines it, in float64 as head.py does.
struct Axis {
    int cells;   // of the scores
    int full;    // pixels of the whole result
    double scale;
};

enum { NONE, LINEAR, NEAREST };                                              // Head.mode
enum { HALF_PIXEL, PYTORCH_HALF_PIXEL, ASYMMETRIC, ALIGN_CORNERS };          // Head.coordinates
enum { ROUND_PREFER_FLOOR, ROUND_PREFER_CEIL, FLOOR, CEIL };                 // Head.rounding

__device__ inline double position(int pixel, Axis axis, int coordinates) {
    double x = (double)pixel;
    if (coordinates == ALIGN_CORNERS) return axis.full > 1 ? x * ((double)(axis.cells - 1) / (axis.full - 1)) : 0.0;
    if (coordinates == ASYMMETRIC) return x / axis.scale;
    if (coordinates == PYTORCH_HALF_PIXEL && axis.full == 1) return 0.0;
    return (x + 0.5) / axis.scale - 0.5;
}

__device__ inline double clamped(double x, int cells) {
    double last = (double)(cells - 1);
    return x < 0.0 ? 0.0 : x > last ? last : x;
}

__device__ inline int nearest(double x, int cells, int rounding) {
    double rounded = rounding == ROUND_PREFER_FLOOR  ? ceil(x - 0.5)
                     : rounding == ROUND_PREFER_CEIL ? floor(x + 0.5)
                     : rounding == FLOOR             ? floor(x)
                                                     : ceil(x);
    return (int)clamped(rounded, cells);
}

// Where the labels' rows, and after them its columns, lie in the scores: cells `low` and `high`, and the share of `high`.
// Once per size, in float64; a pixel needs its row's and its column's entry alone.
extern "C" __global__ void positions(int* low, int* high, float* share, int rows, int columns, int full_height,
                                     int full_width, double scale_y, double scale_x, int height, int width, int mode,
                                     int coordinates, int rounding) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= height + width) return;
    bool is_row = index < height;
    Axis axis = {is_row ? rows : columns, is_row ? full_height : full_width, is_row ? scale_y : scale_x};
    int pixel = is_row ? index : index - height, first = pixel, second = pixel;
    float weight = 0.0f;
    if (mode == NEAREST) {
        first = second = nearest(position(pixel, axis, coordinates), axis.cells, rounding);
    } else if (mode == LINEAR) {
        double cell = clamped(position(pixel, axis, coordinates), axis.cells);
        first = (int)cell;
        second = first + 1 < axis.cells ? first + 1 : axis.cells - 1;
        weight = (float)(cell - first);
    }
    low[index] = first;
    high[index] = second;
    share[index] = weight;
}

// Uncropped scores, [classes, rows, columns], to the labels of an image, [height, width]. With `single`, one score is
// held against `threshold`. The full-size scores exist a pixel at a time only.
template <typename Score, typename Label>
__device__ inline void label(const Score* scores, Label* labels, const int* low, const int* high, const float* share,
                             int classes, int rows, int columns, int height, int width, int linear, int single,
                             float threshold) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    size_t top = (size_t)low[y] * columns, bottom = (size_t)high[y] * columns, plane = (size_t)rows * columns;
    int x0 = low[height + x], x1 = high[height + x];
    float wy = share[y], wx = share[height + x];
    const Score *top_left = scores + top + x0, *top_right = scores + top + x1;
    const Score *bottom_left = scores + bottom + x0, *bottom_right = scores + bottom + x1;
    float best = 0.0f;
    int winner = 0;
    for (int entry = 0; entry < classes; ++entry) {
        size_t place = entry * plane;
        float value = to_float(top_left[place]);
        if (linear) {
            float left = value * (1.0f - wy) + to_float(bottom_left[place]) * wy;
            float right = to_float(top_right[place]) * (1.0f - wy) + to_float(bottom_right[place]) * wy;
            value = left + (right - left) * wx;
        }
        if (single) {
            winner = value > threshold;
        } else if (entry == 0 || value > best) {
            best = value;
            winner = entry;
        }
    }
    labels[(size_t)y * width + x] = (Label)winner;
}

#define PREPARE_ARGUMENTS(Image, Input)                                                                          \
    const Image *image, Input *out, const float *scale, const float *shift, int channels, int height, int width, \
        int padded_height, int padded_width
#define PREPARE prepare(image, out, scale, shift, channels, height, width, padded_height, padded_width)

extern "C" __global__ void prepare_uint8_float32(PREPARE_ARGUMENTS(uint8, float)) { PREPARE; }
extern "C" __global__ void prepare_uint16_float32(PREPARE_ARGUMENTS(uint16, float)) { PREPARE; }
extern "C" __global__ void prepare_int16_float32(PREPARE_ARGUMENTS(short, float)) { PREPARE; }
extern "C" __global__ void prepare_float32_float32(PREPARE_ARGUMENTS(float, float)) { PREPARE; }
extern "C" __global__ void prepare_uint8_float16(PREPARE_ARGUMENTS(uint8, float16)) { PREPARE; }
extern "C" __global__ void prepare_uint16_float16(PREPARE_ARGUMENTS(uint16, float16)) { PREPARE; }
extern "C" __global__ void prepare_int16_float16(PREPARE_ARGUMENTS(short, float16)) { PREPARE; }
extern "C" __global__ void prepare_float32_float16(PREPARE_ARGUMENTS(float, float16)) { PREPARE; }

#define LABEL_ARGUMENTS(Score, Label)                                                                         \
    const Score *scores, Label *labels, const int *low, const int *high, const float *share, int classes,     \
        int rows, int columns, int height, int width, int linear, int single, float threshold
#define LABEL \
    label(scores, labels, low, high, share, classes, rows, columns, height, width, linear, single, threshold)

extern "C" __global__ void label_float32_uint8(LABEL_ARGUMENTS(float, uint8)) { LABEL; }
extern "C" __global__ void label_float32_uint16(LABEL_ARGUMENTS(float, uint16)) { LABEL; }
extern "C" __global__ void label_float16_uint8(LABEL_ARGUMENTS(float16, uint8)) { LABEL; }
extern "C" __global__ void label_float16_uint16(LABEL_ARGUMENTS(float16, uint16)) { LABEL; }
