// The values of standard input (float32) as the blocks of every GGUF type that pack.cpp makes, one type after the other:
// test_instructions.py compiles it for each instruction set, another architecture's too.
#include "../../../ops/cpu/pack.cpp"

#include <cstdio>
#include <vector>

int main() {
    std::vector<float> x;
    for (float value; std::fread(&value, sizeof value, 1, stdin) == 1;) x.push_back(value);
    for (int form : {Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K}) {
        std::vector<uint8_t> out(2 * x.size());
        double error[2] = {};
        const int64_t block = form < Q4_K ? 32 : 256;
        if (!pack_float32(form, x.data(), x.size() / block, out.data(), error)) return 1;
        const int64_t bytes[] = {34, 18, 20, 22, 24, 144, 176, 210};
        std::fwrite(out.data(), 1, x.size() / block * bytes[form - Q8_0], stdout);
    }
}
