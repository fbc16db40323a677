// Compiles an unmodified CUDA kernel file with a host compiler, for the simulated driver.
//
// What is here is what elementwise kernels use: thread indices, half precision, vector types, rounding intrinsics. No
// shared memory, no __syncthreads, no warp intrinsics: threads of a block run one after another, so code that needs
// others to run beside it would be wrong, and does not compile.
//
// build.py includes this file before the .cu and appends a GPUSIM_KERNEL(name) line for each kernel in it. The first
// part, up to GPUSIM_DRIVER, is what driver.cpp and the kernel libraries agree on.
#pragma once
#include <cstddef>

namespace gpusim {

struct Parameter {
    size_t size, alignment;
    int pointer;  // 1: an address, which the driver checks against live allocations
};

struct Kernel {
    const char* name;
    const Parameter* parameters;
    size_t count;
    void (*run)(const void* const* arguments, const unsigned* grid, const unsigned* block);  // the whole grid
};

}  // namespace gpusim

#ifndef GPUSIM_DRIVER
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __restrict__ __restrict
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

#define GPUSIM_VECTOR2(type, name) \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; }; \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }
#define GPUSIM_VECTOR3(type, name) \
    struct name##3 { type x, y, z; }; \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }
#define GPUSIM_VECTOR4(type, name) \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; }; \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
GPUSIM_VECTOR2(unsigned char, uchar)
GPUSIM_VECTOR3(unsigned char, uchar)
GPUSIM_VECTOR4(unsigned char, uchar)
GPUSIM_VECTOR2(unsigned short, ushort)
GPUSIM_VECTOR3(unsigned short, ushort)
GPUSIM_VECTOR4(unsigned short, ushort)
GPUSIM_VECTOR2(int, int)
GPUSIM_VECTOR3(int, int)
GPUSIM_VECTOR4(int, int)
GPUSIM_VECTOR2(unsigned, uint)
GPUSIM_VECTOR4(unsigned, uint)
GPUSIM_VECTOR2(float, float)
GPUSIM_VECTOR3(float, float)
GPUSIM_VECTOR4(float, float)

// CUDA's min and max take mixed types, std's do not. fminf semantics for floats: a NaN loses.
template <class A, class B>
inline auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
inline auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}

template <class T>
inline T __ldg(const T* address) { return *address; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
// Out of range saturates and NaN is 0 on the device, where a C++ cast is undefined.
inline int __float2int_rn(float a) {
    return std::isnan(a) ? 0 : a >= 2147483648.0f ? INT32_MAX : a < -2147483648.0f ? INT32_MIN : int(std::nearbyint(a));
}
inline unsigned __float2uint_rn(float a) {
    return !(a > 0) ? 0u : a >= 4294967296.0f ? UINT32_MAX : unsigned(std::nearbyint(a));
}
inline float __saturatef(float a) { return std::isnan(a) ? 0.0f : std::fmin(std::fmax(a, 0.0f), 1.0f); }
inline unsigned __float_as_uint(float a) {
    unsigned bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
inline int __float_as_int(float a) { return int(__float_as_uint(a)); }
inline float __uint_as_float(unsigned bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

namespace gpusim {

// binary32 → binary16, round to nearest even, with subnormals, infinity from 65520 up, and NaN as the device's 0x7fff.
inline uint16_t half_bits(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which adding 0.5 rounds to
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return uint16_t(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}
inline float half_value(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u) return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
    const float small = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
}

}  // namespace gpusim

struct __half {
    uint16_t bits;
    __half() = default;
    __half(float value) : bits(gpusim::half_bits(value)) {}
    operator float() const { return gpusim::half_value(bits); }
};
using half = __half;
struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline float __half2float(__half value) { return float(value); }
inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    value.bits = bits;
    return value;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

namespace gpusim {

template <class... Types>
struct Runner {
    static inline const Parameter parameters[sizeof...(Types) + 1] = {
        {sizeof(Types), alignof(Types), std::is_pointer_v<Types>}..., {0, 0, 0}};

    template <void (*function)(Types...), size_t... index>
    static void call(const void* const* arguments, std::index_sequence<index...>) {
        function(*static_cast<const std::remove_cv_t<Types>*>(arguments[index])...);
    }

    template <void (*function)(Types...)>
    static void run(const void* const* arguments, const unsigned* grid, const unsigned* block) {
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block[0], block[1], block[2]};
        for (unsigned z = 0; z < grid[2]; ++z)
            for (unsigned y = 0; y < grid[1]; ++y)
                for (unsigned x = 0; x < grid[0]; ++x) {
                    blockIdx = {x, y, z};
                    for (unsigned k = 0; k < block[2]; ++k)
                        for (unsigned j = 0; j < block[1]; ++j)
                            for (unsigned i = 0; i < block[0]; ++i) {
                                threadIdx = {i, j, k};
                                call<function>(arguments, std::index_sequence_for<Types...>{});
                            }
                }
    }
};

template <class... Types>
Runner<Types...> runner_of(void (*)(Types...));

inline std::vector<Kernel>& table() {
    static std::vector<Kernel> kernels;
    return kernels;
}

}  // namespace gpusim

#define GPUSIM_KERNEL(kernel) \
    namespace { \
    const bool gpusim_registered_##kernel = [] { \
        using Runner = decltype(gpusim::runner_of(&kernel)); \
        const size_t count = sizeof(Runner::parameters) / sizeof(gpusim::Parameter) - 1; \
        gpusim::table().push_back({#kernel, Runner::parameters, count, &Runner::template run<&kernel>}); \
        return true; \
    }(); \
    }

extern "C" __attribute__((visibility("default"))) const gpusim::Kernel* gpusim_kernels(size_t* count) {
    *count = gpusim::table().size();
    return gpusim::table().data();
}
#endif  // GPUSIM_DRIVER
