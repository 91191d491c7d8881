// One vector of floats as wide as the processor has, in the compiler's own vector extension (GCC and Clang).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace perception {

#if defined(__AVX512F__)
constexpr int VL = 16;   // floats in a vector
constexpr int ROWS = 12; // rows of a product's tile: with two columns of vectors they fill the registers
#elif defined(__AVX__)
constexpr int VL = 8;
constexpr int ROWS = 6;
#else
constexpr int VL = 4;
constexpr int ROWS = 6;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint8_t vb __attribute__((vector_size(VL)));

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

inline vf fill(float value) { return value - vf{}; } // and not 0 + value, which is not value for -0.0 and costs an addition

// bfloat16 is the upper half of a float.
inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(float x) { return x; }

inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) { // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }

inline float sum(vf x) {
  float total = 0;
  for (int i = 0; i < VL; i++) total += x[i];
  return total;
}

inline float highest(vf x) {
  float top = x[0];
  for (int i = 1; i < VL; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// e^x for x <= 0 or small: 2^n (1 + r + ...), relative error about 1e-7. Below -87 it is 0; a NaN stays one.
inline vf exp(vf x) {
  const vf low = fill(-87.0f);
  const vi alive = ~(x < low);
  x = x < low ? low : x;
  const vf magic = fill(12582912.0f); // 1.5 * 2^23: adding it rounds to a whole number
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi bits = (vi)p + (__builtin_convertvector(n, vi) << 23);
  return (vf)(bits & alive);
}

// Memory of one thread that grows and is kept: no allocation in the inner calls.
class Scratch {
 public:
  float* floats(size_t count) {
    if (count > size_) {
      const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      size_ = memory_ ? count : 0;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  size_t size_ = 0;
};

} // namespace perception
