// y = x W^T for a few rows, and packed weights back as floats. See matvec.h.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "matvec.h"

namespace perception {
namespace {

at::Tensor matvec(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, int64_t outputs) {
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat && x.is_contiguous(), "x is R K, float32, contiguous");
  const Weight w(weight, scale, x.size(1), outputs);
  at::Tensor y = at::zeros({x.size(0), w.outputs}, x.options());
  multiply(prepare(w.form(), x.const_data_ptr<float>(), x.size(0), x.size(1)), {{&w, y.mutable_data_ptr<float>()}});
  return y;
}

// Outputs `from` to `to` (multiples of 16, or the end) of packed weights, N K float32.
at::Tensor unpack(const at::Tensor& weight, const at::Tensor& scale, int64_t inputs, int64_t from, int64_t to) {
  const Weight w(weight, scale, inputs, weight.size(0) * PANEL);
  TORCH_CHECK(w.kind == Kind::INT8 || w.kind == Kind::INT4, "only panels are unpacked");
  TORCH_CHECK(0 <= from && from % PANEL == 0 && from < to && to <= w.outputs, "outputs ", from, " to ", to);
  at::Tensor dense = at::empty({to - from, inputs}, scale.options().dtype(at::kFloat));
  float* out = dense.mutable_data_ptr<float>();
  const int64_t padded = up(inputs, GROUP);
  at::parallel_for(from / PANEL, up(to, PANEL) / PANEL, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++) {
      const int64_t count = std::min<int64_t>(PANEL, to - panel * PANEL);
      for (int64_t i = 0; i < count; i++) {
        float* row = out + (panel * PANEL + i - from) * inputs;
        if (w.kind == Kind::INT8) {
          const int8_t* p = reinterpret_cast<const int8_t*>(w.data) + panel * padded * PANEL + 4 * i;
          const float s = reinterpret_cast<const float*>(w.scale)[panel * PANEL + i];
          for (int64_t k = 0; k < inputs; k++) row[k] = s * float(p[k / 4 * 64 + k % 4]);
          continue;
        }
        const uint8_t* p = reinterpret_cast<const uint8_t*>(w.data) + panel * inputs * PANEL / 2 + 4 * i;
        const uint16_t* s = reinterpret_cast<const uint16_t*>(w.scale) + 2 * (panel * inputs / w.group * PANEL + i);
        for (int64_t k = 0; k < inputs; k += 8) {
          const uint16_t* pair = s + k / w.group * PANEL * 2;
          const float scale = widen(pair[0]), offset = widen(pair[1]);
          for (int j = 0; j < 4; j++) {
            const int b = p[k / 8 * 64 + j];
            row[k + j] = scale * float(b & 15) + offset;
            row[k + 4 + j] = scale * float(b >> 4) + offset;
          }
        }
      }
    }
  });
  return dense;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(perception, m) {
  m.def("matvec(Tensor x, Tensor weight, Tensor scale, int outputs) -> Tensor");
  m.def("unpack(Tensor weight, Tensor scale, int inputs, int start, int end) -> Tensor");
}

TORCH_LIBRARY_IMPL(perception, CPU, m) {
  m.impl("matvec", matvec);
  m.impl("unpack", unpack);
}

}  // namespace perception
