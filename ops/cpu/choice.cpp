// What is chosen for this machine, and single products, for library.py to measure and for tests to check.
#include "amx.h"
#include "products.h"
#include "threads.h"

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

// Linux gives a process the tile registers when it asks for them.
static bool has_amx() {
    constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return granted;
}
#else
static bool has_amx() { return false; }
#endif

Choice choice = [] {
    Choice before_measuring = {};
    before_measuring.bfloat16 = BFLOAT16, before_measuring.amx = has_amx();
    for (auto& tuning : before_measuring.tuning) tuning = {1, 2048, 0};
    for (int form = 0; form < FORMS; form++) before_measuring.many[form] = PRODUCTS[form]->many;
    return before_measuring;
}();

extern "C" {
extern const int form_count = FORMS;

// 0; 1 where this processor (or what the library was compiled for) has no such instruction.
int choose_bfloat16(int form) {
    if (form == BFLOAT16_PAIRS ? !has_pairs : form == BFLOAT16_TILES && !(has_tiles && has_amx())) return 1;
    choice.bfloat16 = Form(form);
    return 0;
}
int choose_amx(int amx) {  // likewise
    if (amx && !has_amx()) return 1;
    choice.amx = amx;
    return 0;
}
int64_t count_tile_setups() {  // by this thread so far
#if AMX
    return tile_setups;
#else
    return 0;
#endif
}
// Returns how many rows are read side by side: not all kinds can read so many.
int choose_tuning(int form, int together, int ahead, int further) {
    choice.tuning[form] = {std::min(together, PRODUCTS[form]->together), ahead, further};
    return choice.tuning[form].together;
}
// Tokens from which rows are unpacked once for all; 0: as long as nothing was measured.
void choose_many(int form, int tokens) {
    choice.many[form] = std::clamp(tokens ? tokens : PRODUCTS[form]->many, 2, MANY);
}
int form_of_linear(const Linear* w) { return form_of(*w); }

// y [count, rows] = weight · x of `count` tokens, x [count, columns]. 1 where there is not enough memory.
int product(const Linear* w, const float* x, int64_t count, float* y, int threads) try {
    const Form form = form_of(*w);
    const int64_t size = PRODUCTS[form]->bytes(w->columns), scratch = scratch_size(w->columns);
    Buffer<char> prepared;
    Buffer<float> results, unpacked;
    prepared.allocate(rounded_up(count, SIDE) * size), results.allocate(threads * count * ROWS), unpacked.allocate(threads * scratch);
    std::unique_ptr<const char*[]> inputs(new const char*[count]);
    for (int64_t i = 0; i < count; i++) {
        inputs[i] = prepared.at(i * size, size);
        PRODUCTS[form]->prepare(x + i * w->columns, w->columns, prepared.at(i * size, size));
    }
    // Whoever measures from how many tokens on this is worth it has fewer rows than a model: it must not decide.
    for (int64_t i = 0; i < count && PRODUCTS[form]->put_beside; i += SIDE)
        PRODUCTS[form]->put_beside(prepared.at(i * size, SIDE * size), w->columns, std::min<int64_t>(count - i, SIDE));
#pragma omp parallel num_threads(threads)
    {
        const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
        const int64_t each = rounded_up((w->rows + parts - 1) / parts, ROWS), end = std::min(w->rows, (part + 1) * each);
        float* some = results.at(part * count * ROWS);
        multiply_rows(*w, part * each, end, inputs.get(), count, some, unpacked.at(part * scratch), [&](int64_t first, int64_t tokens, int64_t row, int64_t n) {
            for (int64_t i = 0; i < tokens; i++) std::copy(some + i * ROWS, some + i * ROWS + n, y + (first + i) * w->rows + row);
        });
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
}
