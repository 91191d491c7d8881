// One pass over memory for what torch does in several: residual bias with LayerNorm, bias with GELU, and rounding to
// 8 bits.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "vector.h"

namespace perception {
namespace {

constexpr int64_t GRAIN = 1 << 14; // elements that are worth a thread

// x (1 + erf(x / sqrt 2)) / 2, erf by formula 7.1.26 of Abramowitz & Stegun (absolute error below 2e-7).
inline vf gelu(vf x) {
  const vf z = x * 0.70710678f;
  const vf a = max(z, -z);
  const vf t = 1.0f / (1.0f + 0.3275911f * a);
  vf p = fill(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf rest = p * t * exp(-a * a);                // 1 - erf(|z|)
  return x * 0.5f * (x > vf{} ? 2.0f - rest : rest); // no difference of near equals on the negative side
}

inline vf some(const float* p, int64_t count) { // the first `count` < VL, then zeros
  float x[VL] = {};
  std::copy(p, p + count, x);
  return load(x);
}

inline void put(float* p, vf x, int64_t count) {
  for (int64_t i = 0; i < count; i++) p[i] = x[i];
}

// to = f(from, column, how many) over a row: whole vectors, then the rest.
template <typename F>
inline void each(const float* from, float* to, int64_t width, F f) {
  int64_t i = 0;
  for (; i + VL <= width; i += VL) store(to + i, f(load(from + i), i, VL));
  if (i < width) put(to + i, f(some(from + i, width - i), i, width - i), width - i);
}

// The sum of f over a row. Four sums at a time, so that none waits for the one before.
template <typename F, typename G>
inline float gather(const float* x, int64_t width, F f, G rest) {
  vf a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * VL <= width; i += 4 * VL) {
    a += f(load(x + i));
    b += f(load(x + i + VL));
    c += f(load(x + i + 2 * VL));
    d += f(load(x + i + 3 * VL));
  }
  for (; i + VL <= width; i += VL) a += f(load(x + i));
  float total = sum((a + b) + (c + d));
  for (; i < width; i++) total += rest(x[i]);
  return total;
}

inline vf take(const float* p, int64_t i, int64_t count) { return count == VL ? load(p + i) : some(p + i, count); }

struct Rows { // a float32 tensor as rows of its last axis
  int64_t count, width;
};

Rows rows_of(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() > 0, name,
              " must be contiguous float32; given ", x.scalar_type(), " ", x.sizes());
  const int64_t width = x.size(-1);
  return {width ? x.numel() / width : 0, width};
}

const float* row_vector(const std::optional<at::Tensor>& x, int64_t width, const char* name) {
  if (!x.has_value() || !x->defined()) return nullptr;
  TORCH_CHECK(x->scalar_type() == at::kFloat && x->is_contiguous() && x->numel() == width, name, " must be ", width,
              " contiguous float32; given ", x->sizes());
  return x->const_data_ptr<float>();
}

template <typename F>
void for_rows(Rows rows, F f) {
  at::parallel_for(0, rows.count, std::max<int64_t>(1, GRAIN / std::max<int64_t>(rows.width, 1)), f);
}

// x += offset, in place; returns LayerNorm(x).
at::Tensor norm(at::Tensor& x, const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& weight,
                const std::optional<at::Tensor>& bias, double eps) {
  const Rows rows = rows_of(x, "x");
  const float *add = row_vector(offset, rows.width, "offset"), *w = row_vector(weight, rows.width, "weight"),
              *b = row_vector(bias, rows.width, "bias");
  at::Tensor out = at::empty_like(x);
  float *from = x.mutable_data_ptr<float>(), *to = out.mutable_data_ptr<float>();
  const int64_t D = rows.width;
  for_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float *row = from + n * D, *y = to + n * D;
      if (add) each(row, row, D, [&](vf v, int64_t i, int64_t c) { return v + take(add, i, c); });
      const vf mean = fill(gather(row, D, [](vf v) { return v; }, [](float v) { return v; }) / D);
      // Of the differences: the square of the sum would lose digits where the mean is large.
      const float square = gather(
          row, D, [&](vf v) { return (v - mean) * (v - mean); }, [&](float v) { return (v - mean[0]) * (v - mean[0]); });
      const vf scale = fill(1.0f / std::sqrt(square / D + float(eps)));
      if (w && b)
        each(row, y, D, [&](vf v, int64_t i, int64_t c) { return (v - mean) * scale * take(w, i, c) + take(b, i, c); });
      else
        each(row, y, D, [&](vf v, int64_t i, int64_t c) {
          v = (v - mean) * scale;
          if (w) v *= take(w, i, c);
          return b ? v + take(b, i, c) : v;
        });
    }
  });
  return out;
}

// x = gelu(x * factor + bias), in place; one factor a row.
void gelu_(at::Tensor& x, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& factor) {
  const Rows rows = rows_of(x, "x");
  const float *b = row_vector(bias, rows.width, "bias"), *f = row_vector(factor, rows.count, "factor");
  float* data = x.mutable_data_ptr<float>();
  for_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float* row = data + n * rows.width;
      const vf scale = fill(f ? f[n] : 1.0f);
      each(row, row, rows.width,
           [&](vf v, int64_t i, int64_t c) { return gelu(b ? v * scale + take(b, i, c) : v * scale); });
    }
  });
}

// x to whole numbers from 0 to `levels`, at most 255: one scale a row, one zero point for all, so that
// (values - zero) * scale is about x and 0 is met exactly.
std::tuple<at::Tensor, at::Tensor, int64_t> quantize(const at::Tensor& x, int64_t levels) {
  const Rows rows = rows_of(x, "x");
  TORCH_CHECK(levels >= 3 && levels <= 255, "levels is 3 to 255; given ", levels);
  const int64_t D = rows.width;
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(at::kByte));
  at::Tensor scales = at::empty(x.sizes().slice(0, x.dim() - 1), x.options());
  if (x.numel() == 0) return {out, scales, levels / 2};
  std::vector<float> lows(rows.count), highs(rows.count);
  const float* from = x.const_data_ptr<float>();
  for_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const float* row = from + n * D;
      vf low{}, high{};
      int64_t i = 0;
      for (; i + VL <= D; i += VL) low = min(low, load(row + i)), high = max(high, load(row + i));
      if (i < D) low = min(low, some(row + i, D - i)), high = max(high, some(row + i, D - i));
      lows[n] = -highest(-low), highs[n] = highest(high);
    }
  });
  double part = 0; // of the levels, that a row would give to what is below 0: the rows' mean, which no single one shifts
  int64_t numbers = 0; // a row that is no number spoils itself alone
  for (int64_t n = 0; n < rows.count; n++) {
    const float own = -lows[n] / std::max(highs[n] - lows[n], 1e-30f);
    if (std::isfinite(own)) part += own, numbers++;
  }
  const int64_t zero = std::lround((levels - 2) * part / std::max<int64_t>(numbers, 1)) + 1; // each side has a level
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  float* scale = scales.mutable_data_ptr<float>();
  for_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      scale[n] = std::max({-lows[n] / zero, highs[n] / (levels - zero), 1e-30f});
      const float factor = 1.0f / scale[n], offset = zero + 0.5f; // all is positive, so that cutting off is rounding
      const float* row = from + n * D;
      int64_t i = 0;
      for (; i + VL <= D; i += VL) {
        const vf level = min(load(row + i) * factor + offset, fill(levels));
        const auto bytes = __builtin_convertvector(__builtin_convertvector(level, vi), vb);
        std::memcpy(to + n * D + i, &bytes, VL);
      }
      for (; i < D; i++) to[n * D + i] = uint8_t(int32_t(std::min(row[i] * factor + offset, float(levels))));
    }
  });
  return {out, scales, zero};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(perception, m) {
  m.def("norm(Tensor(a!) x, Tensor? offset, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("gelu_(Tensor(a!) x, Tensor? bias, Tensor? factor) -> ()");
  m.def("quantize(Tensor x, int levels) -> (Tensor, Tensor, int)");
}

TORCH_LIBRARY_IMPL(perception, CPU, m) {
  m.impl("norm", norm);
  m.impl("gelu_", gelu_);
  m.impl("quantize", quantize);
}

} // namespace perception
