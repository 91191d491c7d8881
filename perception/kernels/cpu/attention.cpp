// Softmax attention over a packed qkv, with the rotation and the projection's bias taken in while reading it.
//
// B batch  N tokens  H heads  d head_dim
//
// Keys are laid as panels of 2 VL columns and values as rows, once a head; then ROWS queries at a time: scores of all
// keys, softmax over whole rows, weighted sum. Everything is computed in float32 whatever comes in.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace perception {
namespace {

constexpr int WIDE = 2 * VL;     // keys of one panel
constexpr int BLOCK = 4 * ROWS;  // queries that share what was loaded
constexpr int CHUNK = 64;        // values of so many keys at a time

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One row of head_dim values: widened, times its factor, with its bias, turned by its angles, scaled.
template <typename T>
inline void read_row(const T* x, float factor, const float* bias, const float* cos, const float* sin, float scale,
                     int64_t d, float* to) {
  float row[128];
  for (int64_t i = 0; i < d; i++) row[i] = widen(x[i]) * factor + (bias ? bias[i] : 0.0f);
  if (cos == nullptr) {
    for (int64_t i = 0; i < d; i++) to[i] = row[i] * scale;
    return;
  }
  for (int64_t i = 0; i < d; i += 2) { // two neighbours are one plane
    const float c = cos[i / 2] * scale, s = sin[i / 2] * scale;
    to[i] = row[i] * c - row[i + 1] * s;
    to[i + 1] = row[i] * s + row[i + 1] * c;
  }
}

// scores[r][0..WIDE) = sum over i of q[r][i] * panel[i][0..WIDE)
template <int R>
inline void score_tile(const float* q, const float* panel, int64_t d, float* scores, int64_t stride) {
  vf a[R][2];
  for (int r = 0; r < R; r++) a[r][0] = a[r][1] = vf{};
  for (int64_t i = 0; i < d; i++) {
    const vf k0 = load(panel + i * WIDE), k1 = load(panel + i * WIDE + VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vf x = fill(q[r * d + i]);
      a[r][0] += x * k0;
      a[r][1] += x * k1;
    }
  }
  for (int r = 0; r < R; r++) {
    store(scores + r * stride, a[r][0]);
    store(scores + r * stride + VL, a[r][1]);
  }
}

// sums[r][0..V*VL) += sum over k < keys of p[r][k] * values[k][0..V*VL)
template <int R, int V>
inline void value_tile(const float* p, int64_t p_stride, const float* values, int64_t v_stride, int64_t keys,
                       float* sums, int64_t stride) {
  vf a[R][V];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) a[r][c] = load(sums + r * stride + c * VL);
  for (int64_t k = 0; k < keys; k++) {
    vf v[V];
    for (int c = 0; c < V; c++) v[c] = load(values + k * v_stride + c * VL);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vf x = fill(p[r * p_stride + k]);
      for (int c = 0; c < V; c++) a[r][c] += x * v[c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < V; c++) store(sums + r * stride + c * VL, a[r][c]);
}

// In place: e^(x - highest) of the first `keys`, 0 up to `padded`. Returns one over their sum.
inline float soften(float* row, int64_t keys, int64_t padded) {
  std::fill(row + keys, row + padded, -std::numeric_limits<float>::infinity());
  vf top = load(row);
  for (int64_t k = VL; k < padded; k += VL) top = max(top, load(row + k));
  const vf high = fill(highest(top));
  vf total{};
  for (int64_t k = 0; k < padded; k += VL) {
    const vf e = exp(load(row + k) - high);
    store(row + k, e);
    total += e;
  }
  return 1.0f / sum(total);
}

template <typename T>
struct Head { // the rows of one head of one picture
  const T *q, *k, *v;
  int64_t row; // from one token to the next
  const float* factor; // N, one a token, or null
  const float *q_bias, *k_bias, *v_bias;
  const float *cos, *sin; // N d/2, or null
  T* out;
  int64_t out_row;
};

// Keys as panels of columns, values as rows padded to whole vectors.
template <typename T>
void lay_out(const Head<T>& head, int64_t keys, int64_t d, float* panels, float* values) {
  const int64_t padded = round_up(keys, WIDE), wide = round_up(d, VL);
  float row[128];
  for (int64_t k = 0; k < padded; k++) {
    float* column = panels + k / WIDE * WIDE * d + k % WIDE;
    if (k < keys) {
      const float factor = head.factor ? head.factor[k] : 1.0f;
      read_row(head.k + k * head.row, factor, head.k_bias, head.cos ? head.cos + k * d / 2 : nullptr,
               head.sin ? head.sin + k * d / 2 : nullptr, 1.0f, d, row);
      read_row(head.v + k * head.row, factor, head.v_bias, nullptr, nullptr, 1.0f, d, values + k * wide);
    } else {
      std::fill(row, row + d, 0.0f);
      std::fill(values + k * wide, values + (k + 1) * wide, 0.0f);
    }
    for (int64_t i = 0; i < d; i++) column[i * WIDE] = row[i];
    for (int64_t i = d; i < wide; i++) values[k * wide + i] = 0.0f;
  }
}

template <typename T>
void attend_head(const Head<T>& head, int64_t N, int64_t d, bool causal, int64_t first, int64_t last) {
  static thread_local Scratch scratch;
  const int64_t keys = causal ? last : N, padded = round_up(keys, WIDE), wide = round_up(d, VL);
  float* panels = scratch.floats(padded * d + padded * wide + BLOCK * (d + padded + wide));
  float* values = panels + padded * d;
  float* queries = values + padded * wide;
  float* scores = queries + BLOCK * d;
  float* sums = scores + BLOCK * padded;
  float over[BLOCK];
  lay_out(head, keys, d, panels, values);
  const float scale = 1.0f / std::sqrt(float(d));
  for (int64_t n = first; n < last; n += BLOCK) {
    const int64_t rows = std::min<int64_t>(BLOCK, last - n), tiled = round_up(rows, ROWS);
    const int64_t seen = causal ? std::min(n + rows, keys) : keys, reach = round_up(seen, WIDE);
    for (int64_t r = 0; r < tiled; r++) { // rows past the last repeat it, so that a tile is always whole
      const int64_t m = std::min(n + r, last - 1);
      read_row(head.q + m * head.row, head.factor ? head.factor[m] : 1.0f, head.q_bias, head.cos ? head.cos + m * d / 2 : nullptr,
               head.sin ? head.sin + m * d / 2 : nullptr, scale, d, queries + r * d);
    }
    for (int64_t k = 0; k < reach; k += WIDE) // one panel stays in the first cache for all rows of the block
      for (int64_t r = 0; r < tiled; r += ROWS)
        score_tile<ROWS>(queries + r * d, panels + k * d, d, scores + r * padded + k, padded);
    for (int64_t r = 0; r < tiled; r++)
      over[r] = soften(scores + r * padded, causal ? std::min(n + r + 1, seen) : keys, reach);
    std::fill(sums, sums + tiled * wide, 0.0f);
    for (int64_t k = 0; k < seen; k += CHUNK) // and so do these values
      for (int64_t r = 0; r < tiled; r += ROWS) {
        const int64_t some = std::min<int64_t>(CHUNK, seen - k);
        const float *p = scores + r * padded + k, *v = values + k * wide;
        float* to = sums + r * wide;
        int64_t c = 0;
        for (; c + 2 * VL <= wide; c += 2 * VL) value_tile<ROWS, 2>(p, padded, v + c, wide, some, to + c, wide);
        for (; c < wide; c += VL) value_tile<ROWS, 1>(p, padded, v + c, wide, some, to + c, wide);
      }
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < d; i++) narrow(sums[r * wide + i] * over[r], head.out + (n + r) * head.out_row + i);
  }
}

template <typename T>
void attend(const at::Tensor& qkv, int64_t heads, const float* bias, const float* factor, const float* cos, const float* sin, bool causal,
            at::Tensor& out) {
  const int64_t B = qkv.size(0), N = qkv.size(1), D = qkv.size(2) / 3, d = D / heads;
  // Queries are split only as far as it takes to keep every thread busy: each part lays out the keys again.
  const int64_t threads = at::get_num_threads(), blocks = (N + BLOCK - 1) / BLOCK;
  const int64_t parts = std::clamp<int64_t>((4 * threads + B * heads - 1) / (B * heads), 1, blocks);
  const int64_t step = round_up((N + parts - 1) / parts, BLOCK);
  const T* base = static_cast<const T*>(qkv.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  at::parallel_for(0, B * heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / (heads * parts), h = task / parts % heads, first = task % parts * step;
      const T* x = base + b * qkv.stride(0) + h * d;
      const float* offset = bias ? bias + h * d : nullptr;
      Head<T> head{x, x + D, x + 2 * D, qkv.stride(1), factor ? factor + b * N : nullptr, offset, offset ? offset + D : nullptr,
                   offset ? offset + 2 * D : nullptr, cos, sin, to + b * N * D + h * d, D};
      if (first < N) attend_head(head, N, d, causal, first, std::min(first + step, N));
    }
  });
}

const float* floats(const std::optional<at::Tensor>& x, at::IntArrayRef shape, const char* name) {
  if (!x.has_value() || !x->defined()) return nullptr;
  TORCH_CHECK(x->scalar_type() == at::kFloat && x->is_contiguous() && x->sizes() == shape, name,
              " must be contiguous float32 of ", shape, "; given ", x->sizes());
  return x->const_data_ptr<float>();
}

at::Tensor attention(const at::Tensor& qkv, int64_t heads, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& factor, const std::optional<at::Tensor>& cos, const std::optional<at::Tensor>& sin, bool causal) {
  TORCH_CHECK(qkv.dim() == 3 && qkv.stride(2) == 1 && heads > 0 && qkv.size(2) % (3 * heads) == 0,
              "qkv is B N 3*heads*head_dim, contiguous along the last; given ", qkv.sizes(), " for ", heads, " heads");
  const int64_t N = qkv.size(1), D = qkv.size(2) / 3, d = D / heads;
  TORCH_CHECK(d % 2 == 0 && d <= 128, "head_dim must be even and at most 128; given ", d);
  TORCH_CHECK(cos.has_value() == sin.has_value(), "give both cos and sin, or neither");
  const float *offset = floats(bias, {3 * D}, "bias"), *scale = floats(factor, {qkv.size(0), N}, "factor");
  const float *c = floats(cos, {N, d / 2}, "cos"), *s = floats(sin, {N, d / 2}, "sin");
  at::Tensor out = at::empty({qkv.size(0), N, D}, qkv.options());
  if (out.numel() == 0) return out;
  if (qkv.scalar_type() == at::kFloat) {
    attend<float>(qkv, heads, offset, scale, c, s, causal, out);
  } else {
    TORCH_CHECK(qkv.scalar_type() == at::kBFloat16, "qkv is float32 or bfloat16; given ", qkv.scalar_type());
    attend<uint16_t>(qkv, heads, offset, scale, c, s, causal, out);
  }
  return out;
}

// Each query looks at a few rows named one by one: a tree of texts, where a token's row serves every text it begins.
//
// q     R D, rows that look          kv  T 2 D, all rows' keys and values      bias 3 D: of q, k and v
// path  R L int32, the rows each query looks at, itself among them; lengths R int32, how many of the L count
at::Tensor attention_paths(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& path, const at::Tensor& lengths,
                           int64_t heads, const std::optional<at::Tensor>& bias) {
  const int64_t R = q.size(0), D = q.size(1), L = path.size(1), T = kv.size(0), d = D / heads;
  TORCH_CHECK(q.scalar_type() == at::kFloat && kv.scalar_type() == at::kFloat, "q and kv are float32");
  TORCH_CHECK(q.dim() == 2 && kv.dim() == 2 && q.stride(1) == 1 && kv.stride(1) == 1 && kv.size(1) == 2 * D,
              "q is R D and kv T 2*D; given ", q.sizes(), " and ", kv.sizes());
  TORCH_CHECK(D % heads == 0 && d <= 128, "head_dim must be at most 128; given ", d);
  TORCH_CHECK(path.scalar_type() == at::kInt && path.is_contiguous() && path.size(0) == R &&
                  lengths.scalar_type() == at::kInt && lengths.is_contiguous() && lengths.numel() == R,
              "path is R L and lengths R, both contiguous int32; given ", path.sizes(), " and ", lengths.sizes());
  const float* offset = floats(bias, {3 * D}, "bias");
  at::Tensor out = at::empty({R, D}, q.options());
  const int32_t *rows = path.const_data_ptr<int32_t>(), *counts = lengths.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < R; r++) {
    TORCH_CHECK(counts[r] > 0 && counts[r] <= L, "a query looks at 1 to ", L, " rows; given ", counts[r]);
    for (int64_t l = 0; l < counts[r]; l++)
      TORCH_CHECK(rows[r * L + l] >= 0 && rows[r * L + l] < T, "no row ", rows[r * L + l], " among ", T);
  }
  const float *queries = q.const_data_ptr<float>(), *keys = kv.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const int64_t q_row = q.stride(0), kv_row = kv.stride(0);
  const float scale = 1.0f / std::sqrt(float(d));
  at::parallel_for(0, R, 8, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const int64_t padded = round_up(L, VL);
    float* scores = scratch.floats(padded);
    for (int64_t r = begin; r < end; r++) {
      const int64_t count = counts[r];
      const int32_t* seen = rows + r * L;
      for (int64_t h = 0; h < heads; h++) {
        float query[128], sums[128];
        // A bias of the keys adds the same to all scores of a query, which softmax does not see.
        for (int64_t i = 0; i < d; i++)
          query[i] = (queries[r * q_row + h * d + i] + (offset ? offset[h * d + i] : 0.0f)) * scale;
        for (int64_t l = 0; l < count; l++) {
          const float* key = keys + seen[l] * kv_row + h * d;
          vf total{};
          int64_t i = 0;
          for (; i + VL <= d; i += VL) total += load(query + i) * load(key + i);
          float dot = sum(total);
          for (; i < d; i++) dot += query[i] * key[i];
          scores[l] = dot;
        }
        const float over = soften(scores, count, round_up(count, VL));
        for (int64_t i = 0; i < d; i++) sums[i] = 0.0f;
        for (int64_t l = 0; l < count; l++) {
          const float* value = keys + seen[l] * kv_row + D + h * d;
          const float p = scores[l];
          for (int64_t i = 0; i < d; i++) sums[i] += p * value[i];
        }
        for (int64_t i = 0; i < d; i++) // the weights add up to 1, and so does what they put before the bias
          to[r * D + h * d + i] = sums[i] * over + (offset ? offset[2 * D + h * d + i] : 0.0f);
      }
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(perception, m) {
  m.def("attention(Tensor qkv, int heads, Tensor? bias, Tensor? factor, Tensor? cos, Tensor? sin, bool causal) -> Tensor");
  m.def("attention_paths(Tensor q, Tensor kv, Tensor path, Tensor lengths, int heads, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(perception, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_paths", attention_paths);
}

} // namespace perception
