// Fibres for simt.h: one machine per thread of the process, which resumes the fibres of a warp in
// turns until all wait for the same, then the warps of a block, then goes on to the next block.
#include "simt_mma.h"

#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

thread_local nvfp4::simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace nvfp4::simt {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kFence = 256;
constexpr unsigned char kFenceByte = 0x5a;

// Saves the callee-saved registers and the stack pointer, and takes on others. swapcontext does so
// too, but asks the kernel for the signal mask at every switch.
#if defined(__x86_64__)
using Context = void*;
extern "C" void nvfp4_simt_switch(Context* from, Context to);
asm(R"(
.text
.type nvfp4_simt_switch, @function
nvfp4_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void go(Context& from, Context& to) { nvfp4_simt_switch(&from, to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    // after the jump 8 off a multiple of 16, as after a call
    auto** top = reinterpret_cast<void**>(stack + kStack) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    context = top - 6;
}
#else
using Context = ucontext_t;
void go(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, entry, 0);
}
#endif

struct Fibre {
    Context context;
    Wait wait = Wait::none;
    int shuffles = 0, distance = 0;
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};  // new aligns to 16
};

struct Machine {
    std::vector<Fibre> fibres;
    std::vector<uint32_t> mail;  // two boxes a thread: a lane may be one shuffle ahead of another
    std::vector<unsigned char> shared;
    const std::function<void()>* body = nullptr;
    Context scheduler;
    int running = 0, order = 0;
    std::string error;
};

thread_local Machine machine;

void enter() {
    try {
        (*machine.body)();
    } catch (const std::exception& e) {
        machine.error = e.what();
    }
    wait_for_others(Wait::done);
}

void resume(int thread) {
    Fibre& fibre = machine.fibres[static_cast<size_t>(thread)];
    fibre.wait = Wait::none;
    machine.running = thread;
    threadIdx.x = static_cast<unsigned>(thread);
    go(machine.scheduler, fibre.context);
}

void fail(const std::string& what) {
    throw std::logic_error(what + " in block " + std::to_string(blockIdx.x));
}

// What all of a range of threads wait for; an error if it is not the same.
Wait together(int first, int count, const char* who) {
    const Fibre& one = machine.fibres[static_cast<size_t>(first)];
    for (int t = first; t < first + count; ++t) {
        const Fibre& other = machine.fibres[static_cast<size_t>(t)];
        if (other.wait != one.wait || (one.wait == Wait::shuffle && other.distance != one.distance))
            fail(std::string(who) + " diverges at thread " + std::to_string(t));
    }
    return one.wait;
}

// A warp from one barrier to the next, shuffles included.
void run_warp(int first, int count) {
    do {
        for (int i = 0; i < count; ++i) {
            resume(machine.order % 2 ? first + count - 1 - i : first + i);
            if (!machine.error.empty()) fail(machine.error);
        }
    } while (together(first, count, "a warp") == Wait::shuffle);
}

void run_block(int threads) {
    for (Fibre& fibre : machine.fibres) {
        fibre.shuffles = 0;
        prepare(fibre.context, fibre.stack.get(), enter);
    }
    const int warps = threads / kWarp;
    do {
        for (int i = 0; i < warps; ++i)
            run_warp((machine.order % 2 ? warps - 1 - i : i) * kWarp, kWarp);
    } while (together(0, threads, "a block") != Wait::done);
}

}  // namespace

void wait_for_others(Wait kind) {
    Fibre& fibre = machine.fibres[static_cast<size_t>(machine.running)];
    fibre.wait = kind;
    go(fibre.context, machine.scheduler);
}

Mail gather(const uint32_t* words, int count, int kind) {
    const int thread = machine.running;
    Fibre& fibre = machine.fibres[static_cast<size_t>(thread)];
    const int slot = fibre.shuffles++ % 2;
    const auto box = [&](int of) { return machine.mail.data() + kMail * (2 * of + slot); };
    memcpy(box(thread), words, sizeof *words * static_cast<size_t>(count));
    fibre.distance = kind;
    wait_for_others(Wait::shuffle);
    return {box(thread / kWarp * kWarp)};
}

uint32_t exchange(uint32_t value, int distance) {
    return gather(&value, 1, distance).word(machine.running % kWarp ^ distance, 0);
}

void set_tensor_core(int fraction_bits, int length) {
    const bool ordered = fraction_bits == 0 && length == 0;
    if (!ordered && (fraction_bits < 1 || fraction_bits > 40 || length < 1 || 16 % length != 0))
        throw std::invalid_argument("fraction_bits must be 1 to 40, and length divide 16");
    tensor_core = {fraction_bits, length};
}

unsigned char* shared_memory() { return machine.shared.data() + kFence; }

void set_order(int order) { machine.order = order; }

void run(const std::function<void()>& body, int64_t blocks, int threads, int shared_bytes) {
    if (blocks <= 0 || blocks > 0x7fffffff || threads % kWarp != 0)
        throw std::invalid_argument("no such grid");
    machine.body = &body;
    machine.error.clear();
    if (machine.fibres.size() != static_cast<size_t>(threads))
        machine.fibres = std::vector<Fibre>(static_cast<size_t>(threads));
    machine.mail.assign(static_cast<size_t>(2 * kMail * threads), 0);
    const size_t bytes = static_cast<size_t>(shared_bytes);
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
        blockIdx.x = static_cast<unsigned>(machine.order % 2 ? blocks - 1 - i : i);
        machine.shared.assign(bytes + 2 * kFence, 0xff);
        memset(machine.shared.data(), kFenceByte, kFence);
        memset(machine.shared.data() + kFence + bytes, kFenceByte, kFence);
        run_block(threads);
        for (size_t j = 0; j < kFence; ++j)
            if (machine.shared[j] != kFenceByte || machine.shared[kFence + bytes + j] != kFenceByte)
                fail("a write outside of shared memory");
    }
}

}  // namespace nvfp4::simt
