// One block of a Llama decoder for a few tokens, in one call: at one token a step, torch's own cost of calling ten
// operators a block is what a small model spends its time on.
//
// R rows (tokens)  E width  H heads  G kv_heads  D head_dim  S tokens kept

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "matvec.h"

namespace perception {
namespace {

constexpr int64_t KEYS = 64;       // keys whose scores exist at a time
constexpr int64_t STRETCH = 256;   // keys that are worth a thread of their own

void rms_norm(const float* x, const float* gain, float* y, int64_t width, float eps) {
  vf squares{};
  int64_t i = 0;
  for (; i + VL <= width; i += VL) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < width; i++) total += x[i] * x[i];
  const float scale = 1 / std::sqrt(total / float(width) + eps);
  for (i = 0; i + VL <= width; i += VL) store(y + i, load(x + i) * scale * load(gain + i));
  for (; i < width; i++) y[i] = x[i] * scale * gain[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i++) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

inline vf wide(const float* p) { return load(p); }
inline vf wide(const uint16_t* p) {
  typedef uint16_t vh __attribute__((vector_size(VL * 2)));
  vh x;
  std::memcpy(&x, p, sizeof(x));
  return (vf)(__builtin_convertvector(x, vi) << 16);
}

template <typename T>
float dot(const float* q, const T* k, int64_t width) {
  vf a{}, b{};
  int64_t i = 0;
  for (; i + 2 * VL <= width; i += 2 * VL) a += load(q + i) * wide(k + i), b += load(q + i + VL) * wide(k + i + VL);
  float total = sum(a + b);
  for (; i < width; i++) total += q[i] * widen(k[i]);
  return total;
}

template <typename T>
void add(float* y, float weight, const T* v, int64_t width) {
  int64_t i = 0;
  for (; i + VL <= width; i += VL) store(y + i, load(y + i) + weight * wide(v + i));
  for (; i < width; i++) y[i] += weight * widen(v[i]);
}

// What the queries of one group of heads read of the keys `from` to `to`: weights relative to the highest score.
// state  of each head: highest score, sum of weights, then D sums of weighted values
template <typename T>
void attend(const float* q, const T* keys, const T* values, int64_t from, int64_t to, int64_t heads, int64_t width,
            float* state) {
  const float scale = 1 / std::sqrt(float(width));
  for (int64_t h = 0; h < heads; h++) {
    float* s = state + h * (width + 2);
    std::fill(s, s + width + 2, 0.0f);
    s[0] = -INFINITY;
  }
  float scores[KEYS];
  for (int64_t start = from; start < to; start += KEYS) {
    const int64_t count = std::min(KEYS, to - start);
    for (int64_t h = 0; h < heads; h++) {  // the keys of a stretch stay in cache from head to head
      float *s = state + h * (width + 2), top = s[0];
      for (int64_t i = 0; i < count; i++) {
        scores[i] = scale * dot(q + h * width, keys + (start + i) * width, width);
        top = scores[i] > top ? scores[i] : top;
      }
      const float shrink = std::exp(s[0] - top);
      for (int64_t i = 0; i < width + 1; i++) s[1 + i] *= shrink;
      s[0] = top;
      for (int64_t i = 0; i < count; i++) {
        const float weight = std::exp(scores[i] - top);
        s[1] += weight;
        add(s + 2, weight, values + (start + i) * width, width);
      }
    }
  }
}

// One state out of several, over `count` stretches: y = values / sum of weights.
void finish(const float* states, int64_t count, int64_t stride, int64_t width, float* y) {
  float top = -INFINITY, total = 0;
  for (int64_t i = 0; i < count; i++) top = std::max(top, states[i * stride]);
  std::fill(y, y + width, 0.0f);
  for (int64_t i = 0; i < count; i++) {
    const float* s = states + i * stride;
    const float weight = std::exp(s[0] - top);
    total += weight * s[1];
    add(y, weight, s + 2, width);
  }
  for (int64_t i = 0; i < width; i++) y[i] /= total;
}

struct Cache {
  char *keys, *values;
  bool half;
  int64_t heads, room, width;

  Cache(const at::Tensor& k, const at::Tensor& v) : heads(k.size(1)), room(k.size(2)), width(k.size(3)) {
    TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.sizes() == v.sizes() && k.scalar_type() == v.scalar_type(),
                "keys and values are B G S D, contiguous");
    TORCH_CHECK(k.scalar_type() == at::kFloat || k.scalar_type() == at::kBFloat16, "a cache of ", k.scalar_type());
    half = k.scalar_type() == at::kBFloat16;
    keys = static_cast<char*>(k.mutable_data_ptr()), values = static_cast<char*>(v.mutable_data_ptr());
  }

  int64_t at(int64_t row, int64_t head, int64_t slot) const { return ((row * heads + head) * room + slot) * width; }

  template <typename T>
  void put(const float* k, const float* v, int64_t row, int64_t slot) const {
    for (int64_t g = 0; g < heads; g++) {
      T *to_k = reinterpret_cast<T*>(keys) + at(row, g, slot), *to_v = reinterpret_cast<T*>(values) + at(row, g, slot);
      for (int64_t i = 0; i < width; i++) narrow(k[g * width + i], to_k + i), narrow(v[g * width + i], to_v + i);
    }
  }
};

template <typename T>
void attend_all(const Cache& cache, const float* q, const int64_t* rows, const int64_t* slots, int64_t count,
                int64_t heads, float* y) {
  const int64_t each = heads / cache.heads, D = cache.width, size = each * (D + 2), tasks = count * cache.heads;
  const int64_t longest = *std::max_element(slots, slots + count) + 1;
  const int64_t spare = (at::get_num_threads() + tasks - 1) / tasks;
  const int64_t parts = std::max<int64_t>(1, std::min(spare, longest / STRETCH));
  std::vector<float> states(tasks * parts * size);
  at::parallel_for(0, tasks * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const int64_t r = t / parts / cache.heads, g = t / parts % cache.heads, part = t % parts, kept = slots[r] + 1;
      const int64_t a = part * kept / parts, b = (part + 1) * kept / parts, at = cache.at(rows[r], g, 0);
      attend<T>(q + (r * heads + g * each) * D, reinterpret_cast<const T*>(cache.keys) + at,
                reinterpret_cast<const T*>(cache.values) + at, a, b, each, D, states.data() + t * size);
    }
  });
  for (int64_t t = 0; t < tasks; t++)
    for (int64_t h = 0; h < each; h++)
      finish(states.data() + t * parts * size + h * (D + 2), parts, size, D, y + (t * each + h) * D);
}

const float* floats(const at::Tensor& t, int64_t count, const char* what) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == count, what, " is float32, ", count);
  return t.const_data_ptr<float>();
}

// x       R E, the residual stream, changed in place
// weights q, k, v, o, gate, up, down and their scales, as matvec.h has them
// keys    B G S D, and values
// cos     positions D/2, and sin
// places  2 R int64: the row of the cache each token belongs to, and its position, which is its slot
void decoder_block(const at::Tensor& x, const at::Tensor& norm1, const at::Tensor& norm2, at::TensorList weights,
                   at::TensorList scales, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& cos,
                   const at::Tensor& sin, const at::Tensor& places, int64_t heads, int64_t hidden, double eps) {
  TORCH_CHECK(x.dim() == 2 && weights.size() == 7 && scales.size() == 7, "x is R E, and there are seven weights");
  const int64_t R = x.size(0), E = x.size(1);
  const Cache cache(keys, values);
  const int64_t D = cache.width, Q = heads * D, KV = cache.heads * D, half = D / 2;
  TORCH_CHECK(heads % cache.heads == 0, heads, " heads cannot share ", cache.heads);
  float* stream = const_cast<float*>(floats(x, R * E, "x"));
  const float *gain1 = floats(norm1, E, "norm1"), *gain2 = floats(norm2, E, "norm2");
  const float *c = floats(cos, cos.size(0) * half, "cos"), *s = floats(sin, cos.size(0) * half, "sin");
  TORCH_CHECK(places.scalar_type() == at::kLong && places.is_contiguous() && places.numel() == 2 * R, "places is 2 R");
  const int64_t *rows = places.const_data_ptr<int64_t>(), *slots = rows + R;
  for (int64_t r = 0; r < R; r++) {
    TORCH_CHECK(0 <= rows[r] && rows[r] < keys.size(0), "row ", rows[r], " of a cache of ", keys.size(0));
    TORCH_CHECK(0 <= slots[r] && slots[r] < cache.room && slots[r] < cos.size(0), "no slot ", slots[r]);
  }
  const int64_t outputs[] = {Q, KV, KV, E, hidden, hidden, E}, inputs[] = {E, E, E, Q, E, E, hidden};
  std::vector<Weight> w;
  for (int i = 0; i < 7; i++) w.emplace_back(weights[i], scales[i], inputs[i], outputs[i]);

  std::vector<float> normed(R * E), out(R * (Q + 2 * KV), 0.0f), mixed(R * Q), wide(2 * R * hidden, 0.0f);
  const auto norm = [&](const float* gain) {
    for (int64_t r = 0; r < R; r++) rms_norm(stream + r * E, gain, normed.data() + r * E, E, float(eps));
  };
  // Rows of x for every form that a group of weights asks for; mostly one.
  const auto product = [&](const float* from, int64_t k, std::vector<Output> to) {
    while (!to.empty()) {
      const Kind form = to.front().weight->form();
      const auto rest = std::stable_partition(to.begin(), to.end(), [&](const Output& o) { return o.weight->form() == form; });
      multiply(prepare(form, from, R, k), {to.begin(), rest});
      to.erase(to.begin(), rest);
    }
  };

  float *q = out.data(), *k = q + R * Q, *v = k + R * KV;
  norm(gain1);
  product(normed.data(), E, {{&w[0], q}, {&w[1], k}, {&w[2], v}});
  for (int64_t r = 0; r < R; r++) {
    const float *turn_c = c + slots[r] * half, *turn_s = s + slots[r] * half;
    for (int64_t h = 0; h < heads; h++) rotate(q + r * Q + h * D, turn_c, turn_s, half);
    for (int64_t g = 0; g < cache.heads; g++) rotate(k + r * KV + g * D, turn_c, turn_s, half);
    cache.half ? cache.put<uint16_t>(k + r * KV, v + r * KV, rows[r], slots[r])
               : cache.put<float>(k + r * KV, v + r * KV, rows[r], slots[r]);
  }
  cache.half ? attend_all<uint16_t>(cache, q, rows, slots, R, heads, mixed.data())
             : attend_all<float>(cache, q, rows, slots, R, heads, mixed.data());
  product(mixed.data(), Q, {{&w[3], stream}});

  float *gate = wide.data(), *up = gate + R * hidden;
  norm(gain2);
  product(normed.data(), E, {{&w[4], gate}, {&w[5], up}});
  at::parallel_for(0, R * hidden, 1 << 14, [&](int64_t from, int64_t to) {
    int64_t i = from;
    for (; i + VL <= to; i += VL) {
      const vf g = load(gate + i), e = exp(min(g, -g));  // of no positive number: it cannot overflow
      store(gate + i, (g < vf{} ? g * e : g) / (1.0f + e) * load(up + i));
    }
    for (; i < to; i++) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  });
  product(gate, hidden, {{&w[6], stream}});
}

// RMSNorm and a product: what follows the last block.
at::Tensor decoder_head(const at::Tensor& x, const at::Tensor& norm, const at::Tensor& weight, const at::Tensor& scale,
                        int64_t outputs, double eps) {
  TORCH_CHECK(x.dim() == 2, "x is R E");
  const int64_t R = x.size(0), E = x.size(1);
  const float *from = floats(x, R * E, "x"), *gain = floats(norm, E, "norm");
  const Weight w(weight, scale, E, outputs);
  std::vector<float> normed(R * E);
  for (int64_t r = 0; r < R; r++) rms_norm(from + r * E, gain, normed.data() + r * E, E, float(eps));
  at::Tensor y = at::empty({R, w.outputs}, x.options());
  y.zero_();
  multiply(prepare(w.form(), normed.data(), R, E), {{&w, y.mutable_data_ptr<float>()}});
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(perception, m) {
  m.def(
      "decoder_block(Tensor(a!) x, Tensor norm1, Tensor norm2, Tensor[] weights, Tensor[] scales, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor cos, Tensor sin, Tensor places, int heads, int hidden, float eps) -> ()");
  m.def("decoder_head(Tensor x, Tensor norm, Tensor weight, Tensor scale, int outputs, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(perception, CPU, m) {
  m.impl("decoder_block", decoder_block);
  m.impl("decoder_head", decoder_head);
}

}  // namespace perception
