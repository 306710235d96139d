// Every kind of row product against a plain sum in double, and to the same bits whatever is computed together:
// test_instructions.py compiles it for each instruction set, another architecture's too.
#include "../../../ops/cpu/choice.cpp"
#include "../../../ops/cpu/blocks.cpp"
#include "../../../ops/cpu/bytes.cpp"
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

// The products of weights whose values are `numbers`.
void compare(const char* name, const Linear& w, const std::vector<double>& numbers) {
    const int64_t rows = w.rows, columns = w.columns, most = 39;
    std::vector<float> x(most * columns), all(most * rows), some(most * rows);
    for (auto& number : x) number = normal();
    for (int form : {BFLOAT16, BFLOAT16_PAIRS, BFLOAT16_TILES}) {
        if (choose_bfloat16(form) || (w.bits != 16 && form != BFLOAT16)) continue;
        const bool pairs = form == BFLOAT16_PAIRS;
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
        auto check_first = [&](int64_t count) {
            product(&w, x.data(), count, some.data(), 1);
            same = same && !std::memcmp(some.data(), all.data(), count * rows * sizeof(float));
        };
        for (int together : {1, 2, 4})
            for (int ahead : {0, -1, 1024}) {
                if (w.blocks && together + ahead != 1) continue;  // rows of blocks are read one by one
                choose_tuning(form_of(w), together, ahead, 4 * ahead * (ahead > 0));
                check_first(1);
            }
        for (int first : {2, 33}) {
            for (int f = 0; f < FORMS; f++) choose_many(f, first);
            for (int amx = 0; amx < 2 && !choose_amx(amx); amx++)
                for (int64_t count : {2, 3, 4, 7, 8, 9, 16, 17, 32, 33}) check_first(count);
        }
        const bool near = error < largest * (pairs ? 4e-3 : 1e-4);
        if (!near || !same) std::printf("FAILED: ");
        std::printf("%s, %ld columns%s: error %.1e%s\n", name, long(columns), pairs ? ", pairs" : form == BFLOAT16_TILES ? ", tiles" : "", error / largest,
                    same ? "" : ", other bits when computed together");
        if (!near || !same) std::exit(1);
        for (float y : all) digest = (digest ^ read<uint32_t>(&y)) * 1099511628211u;
    }
}

void check(const char* name, int64_t bits, int64_t group, int64_t columns) {
    const int64_t rows = 37, groups = bits > 8 ? 0 : group ? columns / group : 1;
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
    compare(name, {weight.data(), nullptr, groups ? scale.data() : nullptr, rows, columns, columns * bits / 8, bits, groups}, numbers);
}

// One number of a GGUF's row, plainly.
double number_of(int64_t form, const uint8_t* row, int64_t column) {
    auto half = [](const uint8_t* p) { return double(to_float(read<float16>(p))); };
    const int64_t i = column % 32;
    auto nibble = [&](const uint8_t* p) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; };
    auto fifth = [&](const uint8_t* p) { return (p[i / 8] >> i % 8 & 1) << 4; };
    if (form == Q8_0) return row += column / 32 * 34, half(row) * int8_t(row[2 + i]);
    if (form == Q4_0) return row += column / 32 * 18, half(row) * (nibble(row + 2) - 8);
    if (form == Q4_1) return row += column / 32 * 20, half(row) * nibble(row + 4) + half(row + 2);
    if (form == Q5_0) return row += column / 32 * 22, half(row) * ((nibble(row + 6) | fifth(row + 2)) - 16);
    if (form == Q5_1) return row += column / 32 * 24, half(row) * (nibble(row + 8) | fifth(row + 4)) + half(row + 2);
    const int64_t in_block = column % 256, group = in_block / 32;
    if (form == Q6_K) {
        row += column / 256 * 210;
        const int64_t at = in_block / 128, run = in_block % 128 / 32;
        const int low = row[64 * at + run % 2 * 32 + i] >> run / 2 * 4 & 15, high = row[128 + 32 * at + i] >> 2 * run & 3;
        return half(row + 208) * int8_t(row[192 + in_block / 16]) * ((low | high << 4) - 32);
    }
    row += column / 256 * (form == Q4_K ? 144 : 176);
    const uint8_t* packed = row + 4;
    const int scale = group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | packed[group - 4] >> 6 << 4;
    const int minimum = group < 4 ? packed[group + 4] & 63 : packed[group + 4] >> 4 | packed[group] >> 6 << 4;
    int code = row[(form == Q4_K ? 16 : 48) + group / 2 * 32 + i] >> group % 2 * 4 & 15;
    if (form == Q5_K) code |= (row[16 + i] >> group & 1) << 4;
    return half(row) * scale * code - half(row + 2) * minimum;
}

void check_blocks(const char* name, int64_t form, int64_t block, int64_t size, std::vector<int64_t> scales, int64_t columns) {
    if (columns % block) return;
    const int64_t rows = 37, row_bytes = columns / block * size;
    std::vector<uint8_t> weight(rows * row_bytes);
    for (auto& byte : weight) byte = generator();
    for (int64_t i = 0; i < rows * row_bytes; i += size)
        for (int64_t at : scales) weight[i + at + 1] = 0x10 | (weight[i + at + 1] & 0x8f);  // 2^-11 to 2^-7, of either sign
    std::vector<double> numbers(rows * columns);
    std::vector<float> row(columns);
    for (int64_t r = 0; r < rows; r++) {
        PRODUCTS[form]->numbers((const char*)&weight[r * row_bytes], columns, row.data());
        for (int64_t i = 0; i < columns; i++) {
            double& number = numbers[r * columns + i] = number_of(form, &weight[r * row_bytes], i);
            if (std::abs(number - row[i]) > 1e-6 * std::abs(number) + 1e-6) {
                std::printf("FAILED: %s, column %ld of %ld: %g, not %g\n", name, long(i), long(columns), row[i], number);
                std::exit(1);
            }
        }
    }
    compare(name, {weight.data(), nullptr, nullptr, rows, columns, row_bytes, 32, 0, form}, numbers);
}

int main() {
    for (int64_t columns : {32, 96, 288, 2400}) {
        check("float32", 32, 0, columns), check("bfloat16", 16, 0, columns), check("int8", 8, 0, columns);
        check("int8 in groups of 32", 8, 32, columns), check("int8 in groups of 4", 8, 4, columns);
        check("int4 in groups of 32", 4, 32, columns), check("int4 in groups of 8", 4, 8, columns);
        check("int8 in groups of 16", 8, 16, columns), check("int4 in groups of 16", 4, 16, columns);
    }
    for (int64_t group : {48, 64, 128, 192, 256, 768}) {
        check("int8 in large groups", 8, group, 2304 / group * group), check("int4 in large groups", 4, group, 2304 / group * group);
    }
    for (int64_t columns : {32, 800, 1280}) {
        check_blocks("Q8_0", Q8_0, 32, 34, {0}, columns), check_blocks("Q4_0", Q4_0, 32, 18, {0}, columns);
        check_blocks("Q4_1", Q4_1, 32, 20, {0, 2}, columns), check_blocks("Q5_0", Q5_0, 32, 22, {0}, columns);
        check_blocks("Q5_1", Q5_1, 32, 24, {0, 2}, columns), check_blocks("Q4_K", Q4_K, 256, 144, {0, 2}, columns);
        check_blocks("Q5_K", Q5_K, 256, 176, {0, 2}, columns), check_blocks("Q6_K", Q6_K, 256, 210, {208}, columns);
    }
    std::printf("lanes %d, digest %llx\n", LANES, (unsigned long long)digest);
}
