// Adapters.

#include <algorithm>

#include "argument.h"

namespace quire::bindings {
namespace {

void add_lora(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& ranks, const Tensor& part_ends,
              const Tensor& rows, const Tensor& tiles, const Tensor& out) {
    const Argument input("x", x), output("out", out), down("a", a), up("b", b), rank("ranks", ranks);
    const Argument ends("part_ends", part_ends), row("rows", rows), tile("tiles", tiles);
    Lora lora{};
    lora.x = input.of(kFloat32).shaped({kAny, kAny}).contiguous(1).rows();
    lora.k = input.size(1);
    lora.out = output.of(kFloat32).shaped({kAny, kAny}).contiguous().pointer<float>();
    lora.n = output.size(1);
    lora.part_ends = ends.of(kInt32).shaped({kAny}).contiguous().pointer<int32_t>();
    lora.num_parts = ends.size(0);
    lora.a = down.of(kFloat32).shaped({kAny, lora.num_parts, kAny, lora.k}).contiguous().pointer<float>();
    const int64_t num_slots = down.size(0);
    lora.max_rank = down.size(2);
    lora.b = up.of(kFloat32).shaped({num_slots, lora.max_rank, lora.n}).contiguous().pointer<float>();
    lora.ranks = rank.of(kInt32).shaped({num_slots, lora.num_parts}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < num_slots * lora.num_parts; ++i)
        if (lora.ranks[i] < 0 || lora.ranks[i] > lora.max_rank)
            rank.fail("0 to " + std::to_string(lora.max_rank), std::to_string(lora.ranks[i]));
    for (int64_t part = 0, begin = 0; part < lora.num_parts; begin = lora.part_ends[part++])
        if (lora.part_ends[part] < begin || lora.part_ends[part] > lora.n)
            ends.fail("ascending columns up to " + std::to_string(lora.n), std::to_string(lora.part_ends[part]));
    lora.num_rows = input.size(0);
    lora.rows = row.of(kInt32).shaped({lora.num_rows}).contiguous().pointer<int32_t>();
    for (int64_t i = 0; i < lora.num_rows; ++i)
        if (lora.rows[i] < 0 || lora.rows[i] >= output.size(0))
            row.fail("rows below " + std::to_string(output.size(0)), std::to_string(lora.rows[i]));
    lora.tiles = tile.of(kInt32).shaped({kAny, 3}).contiguous().pointer<LoraTile>();
    lora.num_tiles = tile.size(0);
    for (int64_t i = 0; i < lora.num_tiles; ++i) {
        const auto [slot, begin, end] = lora.tiles[i];
        if (slot < 0 || slot >= num_slots || begin < 0 || begin > end || end - begin > kLoraTile || end > lora.num_rows)
            tile.fail("slots below " + std::to_string(num_slots) + " and at most " + std::to_string(kLoraTile) +
                          " of " + std::to_string(lora.num_rows) + " rows",
                      "(" + std::to_string(slot) + ", " + std::to_string(begin) + ", " + std::to_string(end) + ")");
    }
    if (lora.num_rows == 0) return;
    lora.scratch = scratch_of(lora.num_rows * lora.num_parts * lora.max_rank);
    nb::gil_scoped_release release;
    kernels->add_lora(lora);
}

}  // namespace

void bind_lora(nb::module_& m) {
    m.def("add_lora", &add_lora, nb::arg("x"), nb::arg("a"), nb::arg("b"), nb::arg("ranks"), nb::arg("part_ends"),
          nb::arg("rows"), nb::arg("tiles"), nb::arg("out"));
    m.attr("lora_tile") = kLoraTile;
}

}  // namespace quire::bindings
