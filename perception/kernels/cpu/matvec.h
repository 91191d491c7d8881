// y = x W^T for a few rows of x: each weight is read from memory once, and the time is that of reading it.
//
// R rows of x  K inputs  N outputs  P panels of 16 outputs
//
//   float, bf16   N K        in rows, as the model has them; x in float
//   int8          P K/4 64   16 outputs side by side, 4 inputs of each; one scale an output
//   int4          P K/8 64   the same, inputs 8i..8i+3 in the low halves of the bytes and 8i+4..8i+7 in the high ones;
//                            scale and offset (two bfloat16 in 32 bits) for each `group` inputs of an output
//
// Against 8 and 4 bits x is rounded to 8 bits, each 32 of a row with a scale of their own.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vector.h"

namespace perception {

constexpr int PANEL = 16;       // outputs of a panel
constexpr int GROUP = 32;       // inputs that share a scale
constexpr int NV = PANEL / VL;  // vectors of a panel
constexpr int STEP = 2 * VL;    // weights in rows are read so many at a time
constexpr int BLOCK = 1024;     // inputs for which rows of x stay in the first cache
static_assert(BLOCK % STEP == 0 && PANEL % VL == 0);

enum class Kind { FLOAT, BF16, INT8, INT4 };

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- Weights ---------------------------------------------------------------------------------------------------------

struct Weight {
  Kind kind;
  const char* data;
  const char* scale;
  int64_t inputs, outputs, group;

  // outputs: N where it is not in the shape (panels are whole); 0 where it is
  Weight(const at::Tensor& w, const at::Tensor& s, int64_t k, int64_t n) : inputs(k), outputs(n), group(0) {
    TORCH_CHECK(w.is_contiguous() && s.is_contiguous(), "weights must be contiguous");
    data = static_cast<const char*>(w.const_data_ptr());
    scale = s.numel() ? static_cast<const char*>(s.const_data_ptr()) : nullptr;
    if (w.dim() == 2 && (w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16)) {
      kind = w.scalar_type() == at::kFloat ? Kind::FLOAT : Kind::BF16;
      TORCH_CHECK(w.size(1) == k && (!n || n == w.size(0)), "a weight of ", w.sizes(), " for ", k, " inputs");
      outputs = w.size(0);
    } else if (w.scalar_type() == at::kChar) {
      kind = Kind::INT8;
      TORCH_CHECK(w.dim() == 3 && w.size(1) * 4 == up(k, GROUP) && w.size(2) == 64, "no int8 panels for ", k, " inputs");
      TORCH_CHECK(n && w.size(0) == up(n, PANEL) / PANEL, "no panels for ", n, " outputs");
      TORCH_CHECK(s.scalar_type() == at::kFloat && s.numel() == w.size(0) * PANEL, "one scale an output");
    } else {
      kind = Kind::INT4;
      TORCH_CHECK(w.scalar_type() == at::kByte && w.dim() == 3 && w.size(1) * 8 == k && w.size(2) == 64,
                  "no int4 panels for ", k, " inputs");
      TORCH_CHECK(n && w.size(0) == up(n, PANEL) / PANEL, "no panels for ", n, " outputs");
      TORCH_CHECK(s.scalar_type() == at::kInt && s.dim() == 3 && s.size(0) == w.size(0) && s.size(2) == PANEL &&
                      s.size(1) > 0 && k % s.size(1) == 0 && (k / s.size(1)) % GROUP == 0,
                  "one scale and offset a group of a multiple of 32 inputs");
      group = k / s.size(1);
    }
  }

  // Rows of x in the form this kind is multiplied with.
  Kind form() const { return kind == Kind::INT4 ? Kind::INT8 : kind; }
  int64_t blocks() const { return up(outputs, PANEL) / PANEL; }
};

// ---- Rows of x -------------------------------------------------------------------------------------------------------

struct Input {
  Kind form;
  int64_t rows, width;  // width: of a row here, padded with zeros
  std::vector<float> floats, scales, sums;
  std::vector<int8_t> bytes;
  std::vector<int32_t> totals;

  int64_t groups() const { return width / GROUP; }

  Input(Kind form, int64_t rows, int64_t k) : form(form), rows(rows), width(up(k, form == Kind::INT8 ? GROUP : STEP)) {
    if (form == Kind::INT8) {
      bytes.resize(rows * width);
      for (auto* v : {&scales, &sums}) v->resize(rows * groups());
      totals.resize(rows * groups());
    } else {
      floats.resize(rows * width);
    }
  }

  void set(int64_t row, const float* x, int64_t k) {
    if (form == Kind::INT8) return round(row, x, k);
    float* to = floats.data() + row * width;
    if (form == Kind::FLOAT) {
      std::copy(x, x + k, to);
      return;
    }
    // Two neighbouring bf16 weights are one 32-bit word: x comes as its even columns, then its odd ones.
    for (int64_t i = 0; i < width; i += STEP) {
      for (int j = 0; j < VL; j++) {
        to[i + j] = i + 2 * j < k ? x[i + 2 * j] : 0;
        to[i + VL + j] = i + 2 * j + 1 < k ? x[i + 2 * j + 1] : 0;
      }
    }
  }

 private:
  void round(int64_t row, const float* x, int64_t k) {
    for (int64_t g = 0; g < groups(); g++) {
      const int64_t count = std::min<int64_t>(GROUP, k - g * GROUP);
      const float* from = x + g * GROUP;
      float top = 0;
      for (int64_t i = 0; i < count; i++) top = std::max(top, std::fabs(from[i]));
      const float scale = top / 127, back = top > 0 ? 127 / top : 0;
      int8_t* to = bytes.data() + row * width + g * GROUP;
      int32_t total = 0;
      for (int64_t i = 0; i < count; i++) {
        // to the nearest, ties to even; a NaN has no integer, and reaches y through the scale
        const float turned = from[i] * back + 12582912.0f;
        int32_t bits;
        std::memcpy(&bits, &turned, 4);
        to[i] = int8_t(bits);
        total += to[i];
      }
      bool finite = std::isfinite(scale);
      for (int64_t i = 0; finite && i < count; i++) finite = from[i] == from[i];
      const int64_t at = row * groups() + g;
      scales[at] = finite ? scale : NAN;
      totals[at] = total;
      sums[at] = scales[at] * float(total);
    }
  }
};

// x of R rows, each R K floats, for weights of a kind.
inline Input prepare(Kind form, const float* x, int64_t rows, int64_t k) {
  Input in(form, rows, k);
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / k), [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) in.set(r, x + r * k, k);
  });
  return in;
}

// ---- Products: weights in rows ---------------------------------------------------------------------------------------

inline void read(const float* p, vf& a, vf& b) { a = load(p), b = load(p + VL); }
inline void read(const uint16_t* p, vf& even, vf& odd) {
  vi words;
  std::memcpy(&words, p, sizeof(words));
  even = (vf)(words << 16);
  odd = (vf)(words & int32_t(0xffff0000));
}

// acc[m][n] += x[m] . w[n] over `count` inputs, of which the last STEP may not be whole in w.
template <typename W, int M, int N>
inline void tile(const W* w, int64_t stride, const float* x, int64_t width, int64_t count, vf acc[M][N]) {
  constexpr bool FEW = M * N <= 4;  // few sums: each half has its own, so that none waits for the other
  vf more[M][N] = {};
  const auto step = [&](const float* x, auto from) {
    vf a[N], b[N];
    for (int n = 0; n < N; n++) read(from(n), a[n], b[n]);
    for (int m = 0; m < M; m++) {
      const vf even = load(x + m * width), odd = load(x + m * width + VL);
      for (int n = 0; n < N; n++) {
        acc[m][n] += even * a[n];
        (FEW ? more : acc)[m][n] += odd * b[n];
      }
    }
  };
  int64_t i = 0;
  for (; i + STEP <= count; i += STEP) step(x + i, [&](int n) { return w + n * stride + i; });
  if (i < count) {
    W rest[N][STEP] = {};
    for (int n = 0; n < N; n++) std::copy(w + n * stride + i, w + n * stride + count, rest[n]);
    step(x + i, [&](int n) { return rest[n]; });
  }
  if constexpr (FEW)
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) acc[m][n] += more[m][n];
}

template <typename W, int M, int N>
inline void tile_into(const Weight& w, const Input& in, int64_t row, int64_t n0, int64_t k0, int64_t count, float* y,
                      int64_t ld) {
  vf acc[M][N] = {};
  tile<W, M, N>(reinterpret_cast<const W*>(w.data) + n0 * w.inputs + k0, w.inputs, in.floats.data() + row * in.width + k0,
                in.width, count, acc);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) y[(row + m) * ld + n0 + n] += sum(acc[m][n]);
}

template <typename W, int M>
inline void rows_block(const Weight& w, const Input& in, int64_t row, int64_t from, int64_t to, int64_t k0, int64_t count,
                       float* y, int64_t ld) {
  constexpr int N = M == 1 || VL == 16 ? 4 : 2;
  int64_t n = from;
  for (; n + N <= to; n += N) tile_into<W, M, N>(w, in, row, n, k0, count, y, ld);
  for (; n < to; n++) tile_into<W, M, 1>(w, in, row, n, k0, count, y, ld);
}

template <typename W>
void rows_product(const Weight& w, const Input& in, int64_t from, int64_t to, float* y, int64_t ld) {
  // For one tile of rows x is in cache whole; for more, the weights of a block are, while the tiles take turns.
  const int64_t step = in.rows <= 4 ? w.inputs : BLOCK;
  for (int64_t k = 0; k < w.inputs; k += step) {
    const int64_t count = std::min(step, w.inputs - k);
    int64_t r = 0;
    for (; r + 4 <= in.rows; r += 4) rows_block<W, 4>(w, in, r, from, to, k, count, y, ld);
    if (in.rows - r == 3) rows_block<W, 3>(w, in, r, from, to, k, count, y, ld);
    if (in.rows - r == 2) rows_block<W, 2>(w, in, r, from, to, k, count, y, ld);
    if (in.rows - r == 1) rows_block<W, 1>(w, in, r, from, to, k, count, y, ld);
  }
}

// ---- Products: panels ------------------------------------------------------------------------------------------------

struct Quad {  // four bytes of x, for every output of a vector
  vi x;
  explicit Quad(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    x = word - vi{};
  }
};

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
constexpr int BIAS = 128;  // weights are multiplied as w + 128, without a sign
inline vi dot8(vi acc, vi w, Quad q) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_xor_si512((__m512i)w, _mm512_set1_epi8(-128)), (__m512i)q.x);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr int BIAS = 0;
inline vi dot8(vi acc, vi w, Quad q) {
  // |x| times w with the sign of x: two products of 127 * 127 fit into 16 bits
  const __m256i x = _mm256_abs_epi8((__m256i)q.x), y = _mm256_sign_epi8((__m256i)w, (__m256i)q.x);
#if defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, x, y);
#else
  return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(x, y), _mm256_set1_epi16(1));
#endif
}
#else
constexpr int BIAS = 0;
inline vi dot8(vi acc, vi w, Quad q) {
  const int8_t *a = reinterpret_cast<const int8_t*>(&w), *b = reinterpret_cast<const int8_t*>(&q.x);
  for (int i = 0; i < VL; i++)
    for (int j = 0; j < 4; j++) acc[i] += a[4 * i + j] * b[4 * i + j];
  return acc;
}
#endif

// 32 inputs of int4: four vectors of bytes, each with two quads.
inline vi dot4(const char* w, const int8_t* x) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  __m512i acc = _mm512_setzero_si512();
  const __m512i low = _mm512_set1_epi8(15);
  for (int t = 0; t < 4; t++) {
    const __m512i b = _mm512_loadu_si512(w + t * 64);
    acc = _mm512_dpbusd_epi32(acc, _mm512_and_si512(b, low), (__m512i)Quad(x + 8 * t).x);
    acc = _mm512_dpbusd_epi32(acc, _mm512_and_si512(_mm512_srli_epi16(b, 4), low), (__m512i)Quad(x + 8 * t + 4).x);
  }
  return (vi)acc;
#elif defined(__AVX2__) && !defined(__AVX512F__)
  __m256i acc = _mm256_setzero_si256();  // 16 bits hold them all: 16 * 15 * 127 < 32768
  const __m256i low = _mm256_set1_epi8(15);
  for (int t = 0; t < 4; t++) {
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + t * 64));
    const __m256i p = _mm256_maddubs_epi16(_mm256_and_si256(b, low), (__m256i)Quad(x + 8 * t).x);
    const __m256i q =
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(b, 4), low), (__m256i)Quad(x + 8 * t + 4).x);
    acc = _mm256_add_epi16(acc, _mm256_add_epi16(p, q));
  }
  return (vi)_mm256_madd_epi16(acc, _mm256_set1_epi16(1));
#else
  vi acc{};
  for (int t = 0; t < 4; t++)
    for (int i = 0; i < VL; i++)
      for (int j = 0; j < 4; j++) {
        const int b = uint8_t(w[t * 64 + 4 * i + j]);
        acc[i] += (b & 15) * x[8 * t + j] + (b >> 4) * x[8 * t + 4 + j];
      }
  return acc;
#endif
}

inline vf widened(vi x) { return __builtin_convertvector(x, vf); }

template <int M>
inline void panel8(const Weight& w, const Input& in, int64_t row, int64_t panel, vf acc[M][NV]) {
  const char* p = w.data + panel * in.width * PANEL;
  for (int64_t g = 0; g < in.groups(); g++, p += GROUP * PANEL) {
    vi sums[M][NV];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) sums[m][v] = -BIAS * in.totals[(row + m) * in.groups() + g] - vi{};
    for (int i = 0; i < GROUP / 4; i++) {
      for (int v = 0; v < NV; v++) {
        vi b;
        std::memcpy(&b, p + i * 64 + v * VL * 4, sizeof(b));
        for (int m = 0; m < M; m++)
          sums[m][v] = dot8(sums[m][v], b, Quad(in.bytes.data() + (row + m) * in.width + g * GROUP + 4 * i));
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < NV; v++) acc[m][v] += widened(sums[m][v]) * in.scales[(row + m) * in.groups() + g];
  }
  for (int v = 0; v < NV; v++) {
    const vf scale = load(reinterpret_cast<const float*>(w.scale) + panel * PANEL + v * VL);
    for (int m = 0; m < M; m++) acc[m][v] *= scale;
  }
}

template <int M>
inline void panel4(const Weight& w, const Input& in, int64_t row, int64_t panel, vf acc[M][NV]) {
  const char* p = w.data + panel * in.width * PANEL / 2;
  const int64_t groups = w.inputs / w.group, each = w.group / GROUP;
  const char* s = w.scale + panel * groups * PANEL * 4;
  for (int64_t G = 0; G < groups; G++, s += PANEL * 4) {
    vf part[M][NV] = {};
    float total[M] = {};
    for (int64_t g = G * each; g < (G + 1) * each; g++, p += GROUP * PANEL / 2) {
      for (int m = 0; m < M; m++) {
        const int64_t at = (row + m) * in.groups() + g;
        for (int v = 0; v < NV; v++) {
          const vi dots = dot4(p + v * VL * 4, in.bytes.data() + (row + m) * in.width + g * GROUP);
          part[m][v] += widened(dots) * in.scales[at];
        }
        total[m] += in.sums[at];
      }
    }
    for (int v = 0; v < NV; v++) {
      vf scale, offset;
      read(reinterpret_cast<const uint16_t*>(s + v * VL * 4), scale, offset);
      for (int m = 0; m < M; m++) acc[m][v] += part[m][v] * scale + offset * total[m];
    }
  }
}

template <int M>
inline void panel_into(const Weight& w, const Input& in, int64_t row, int64_t panel, float* y, int64_t ld) {
  vf acc[M][NV] = {};
  w.kind == Kind::INT8 ? panel8<M>(w, in, row, panel, acc) : panel4<M>(w, in, row, panel, acc);
  const int64_t n0 = panel * PANEL, count = std::min<int64_t>(PANEL, w.outputs - n0);
  for (int m = 0; m < M; m++)
    for (int64_t n = 0; n < count; n++) y[(row + m) * ld + n0 + n] += acc[m][n / VL][n % VL];
}

inline void panel_product(const Weight& w, const Input& in, int64_t from, int64_t to, float* y, int64_t ld) {
  for (int64_t panel = from; panel < to; panel++) {
    int64_t r = 0;
    for (; r + 4 <= in.rows; r += 4) panel_into<4>(w, in, r, panel, y, ld);
    if (in.rows - r == 3) panel_into<3>(w, in, r, panel, y, ld);
    if (in.rows - r == 2) panel_into<2>(w, in, r, panel, y, ld);
    if (in.rows - r == 1) panel_into<1>(w, in, r, panel, y, ld);
  }
}

// ---- One call --------------------------------------------------------------------------------------------------------

struct Output {
  const Weight* weight;
  float* y;  // R N, added to
};

// y += x W^T for several weights that read the same x. Blocks of 16 outputs are dealt to the threads.
inline void multiply(const Input& in, const std::vector<Output>& outputs) {
  int64_t blocks = 0;
  for (const Output& o : outputs) blocks += o.weight->blocks();
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (const Output& o : outputs) {
      const Weight& w = *o.weight;
      const int64_t a = std::max<int64_t>(from, 0), b = std::min(to, w.blocks());
      for (int64_t block = a; block < b;) {
        // rows of weights that stay in the second cache while the tiles of x take turns; one tile streams them all
        const int64_t end = in.rows <= 4 ? b : std::min(b, block + 1);
        const int64_t n0 = block * PANEL, n1 = std::min(end * PANEL, w.outputs);
        if (w.kind == Kind::FLOAT) rows_product<float>(w, in, n0, n1, o.y, w.outputs);
        else if (w.kind == Kind::BF16) rows_product<uint16_t>(w, in, n0, n1, o.y, w.outputs);
        else panel_product(w, in, block, end, o.y, w.outputs);
        block = end;
      }
      from -= w.blocks(), to -= w.blocks();
    }
  });
}

}  // namespace perception
