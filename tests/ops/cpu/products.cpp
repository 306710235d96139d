// Every kind of row product against a plain sum in double, and to the same bits whatever is computed together:
// test_instructions.py compiles it for each instruction set, another architecture's too.
#include "../../../ops/cpu/choice.cpp"
#include "../../../ops/cpu/blocks.cpp"
#include "../../../ops/cpu/codes.cpp"
#include "../../../ops/cpu/floats.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

std::mt19937 generator(1);
float normal() { return std::normal_distribution<float>()(generator); }

// A digest of results, so that instruction sets with the same lanes can be compared.
uint64_t digest = 14695981039346656037u;

void check(const char* name, int64_t bits, int64_t group, int64_t columns) {
    const int64_t rows = 37, most = 39, groups = bits > 8 ? 0 : group ? columns / group : 1;
    std::vector<char> weight(rows * columns * bits / 8);
    std::vector<bfloat16> scale(rows * std::max(groups, int64_t(1)));
    std::vector<double> numbers(rows * columns);
    for (auto& s : scale) assign(s, 0.01f * (1.5f + std::tanh(normal())));
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t row = i / columns, column = i % columns;
        if (bits == 32) {
            ((float*)weight.data())[i] = numbers[i] = normal();
        } else if (bits == 16) {
            bfloat16& number = ((bfloat16*)weight.data())[i];
            assign(number, normal()), numbers[i] = to_float(number);
        } else {
            const int code = generator() % (1 << bits);
            uint8_t& byte = ((uint8_t*)weight.data())[i * bits / 8];
            byte = bits == 8 ? code : byte | code << 4 * (i % 2);
            numbers[i] = (code - (1 << (bits - 1))) * double(to_float(scale[row * groups + (group ? column / group : 0)]));
        }
    }
    std::vector<float> x(most * columns), all(most * rows), some(most * rows);
    for (auto& number : x) number = normal();
    const Linear w = {weight.data(), nullptr, groups ? scale.data() : nullptr, rows, columns, columns * bits / 8, bits, groups};
    for (int pairs = 0; pairs <= (bits == 16); pairs++) {
        if (choose_pairs(pairs)) continue;
        if (product(&w, x.data(), most, all.data(), 1)) std::abort();
        double error = 0, largest = 0;
        for (int64_t k = 0; k < most; k++)
            for (int64_t row = 0; row < rows; row++) {
                double expected = 0;
                for (int64_t i = 0; i < columns; i++) expected += numbers[row * columns + i] * x[k * columns + i];
                error = std::max(error, std::abs(expected - all[k * rows + row]));
                largest = std::max(largest, std::abs(expected));
            }
        bool same = true;
        for (int together : {1, 2, 4})
            for (int ahead : {0, -1, 1024}) {
                choose_tuning(form_of(w), together, ahead);
                for (int amx = 0; amx < 2 && !choose_amx(amx); amx++)
                    for (int64_t count : {1, 2, 3, 4, 7, 17, 39}) {
                        product(&w, x.data(), count, some.data(), 1);
                        same = same && !std::memcmp(some.data(), all.data(), count * rows * sizeof(float));
                    }
            }
        const bool near = error < largest * (pairs ? 4e-3 : 1e-4);
        if (!near || !same) std::printf("FAILED: ");
        std::printf("%s, %ld columns%s: error %.1e%s\n", name, long(columns), pairs ? ", pairs" : "", error / largest,
                    same ? "" : ", other bits when computed together");
        if (!near || !same) std::exit(1);
        for (float y : all) digest = (digest ^ read<uint32_t>(&y)) * 1099511628211u;
    }
}

int main() {
    for (int64_t columns : {32, 96, 288, 2400}) {
        check("float32", 32, 0, columns), check("bfloat16", 16, 0, columns), check("int8", 8, 0, columns);
        check("int8 in groups of 32", 8, 32, columns), check("int8 in groups of 4", 8, 4, columns);
        check("int4 in groups of 32", 4, 32, columns), check("int4 in groups of 8", 4, 8, columns);
    }
    for (int64_t group : {64, 128, 192, 256, 768}) {
        check("int8 in large groups", 8, group, 2304 / group * group), check("int4 in large groups", 4, group, 2304 / group * group);
    }
    std::printf("lanes %d, digest %llx\n", LANES, (unsigned long long)digest);
}
