// See emulate.h. Layouts and barrier rules here are written from the PTX manual, not from the kernels' own functions.
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "platform.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

using namespace glm_hopper;

namespace emulate {
namespace {

constexpr u32 shared_start = 0x410;  // on purpose no multiple of 1024
constexpr size_t stack_bytes = 256 << 10;
constexpr u8 poison = 0x7f;  // NaN in E4M3
alignas(16) constexpr u8 unfenced[16] = {poison, poison, poison, poison, poison, poison, poison, poison,
                                         poison, poison, poison, poison, poison, poison, poison, poison};

struct Barrier {
    u32 expected = 0, pending = 0, phase = 0;
    i64 bytes = 0;
};

struct Rendezvous {
    int arrived = 0;
    u64 generation = 0;
};

struct Block;

struct Operation {  // one wgmma of one thread
    float* d;
    int columns;
    u64 a, b;
    bool accumulate, done;
};

struct Fibre {
    Block* block;
    int thread;
    ucontext_t context{};
    void* stack = nullptr;
    void* fake_stack = nullptr;
    bool finished = false;
    std::function<bool()> ready;
    std::string waits_for;
    std::vector<std::pair<u32, const u8*>> chunks;  // cp.async not yet tied to a barrier
    std::deque<std::vector<Operation>> groups;      // committed wgmma groups under way, oldest first
    std::vector<Operation> open;                    // not committed yet
    std::map<float*, std::vector<float>> held;      // true values of accumulators under way
    size_t products = 0;                            // wgmmas issued so far
    u64 fence_time = 0, global_fence_time = 0;
    i64 arrived = -1;  // generation of the cluster's barrier at which it has arrived and not yet waited
    int registers = 0;
};

struct Warp {
    Rendezvous meet;
    u32 value[2][32];
};

struct Granule {  // 16 bytes of shared memory: last ordinary write, if no copy engine has written since
    u64 time = 0;
    Fibre* writer = nullptr;
};

struct Cluster;

struct Block {
    Cluster* cluster;
    int index, rank;
    std::vector<u8> shared;
    std::vector<Granule> granules;
    std::map<u32, Barrier> barriers;
    std::map<int, Rendezvous> named;
    std::map<int, int> named_threads;
    Rendezvous all;
    std::vector<Warp> warps;
    std::vector<std::vector<u64>> products;  // of each warpgroup: what its first thread to arrive issued
    std::vector<std::unique_ptr<Fibre>> fibres;
    int running = 0;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    Rendezvous all;
    int running = 0;
};

struct World {
    Launch launch;
    const std::function<void()>* kernel;
    std::mt19937 random;
    ucontext_t scheduler{};
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    void* scheduler_fake = nullptr;
    std::vector<std::unique_ptr<Cluster>> clusters;
    std::vector<std::function<void()>> flying;  // copies under way
    std::unordered_map<u64, u64> written;  // of global memory, by address / 16: time of the last ordinary write of this launch
    u64 time = 1;
    bool progress = false;
};

World* world = nullptr;
Fibre* current = nullptr;
std::vector<void*> free_stacks;

bool chance(unsigned percent) { return world->random() % 100 < percent; }

void switch_to_scheduler() {
    Fibre* self = current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->finished ? nullptr : &self->fake_stack, world->scheduler_stack, world->scheduler_stack_size);
#endif
    swapcontext(&self->context, &world->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &world->scheduler_stack, &world->scheduler_stack_size);
#endif
}

void wait_until(std::function<bool()> ready, std::string what) {
    if (ready() && !chance(3)) return;
    current->ready = std::move(ready);
    current->waits_for = std::move(what);
    switch_to_scheduler();
}

std::string number(u64 value) { return std::to_string(value); }

void fibre_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &world->scheduler_stack, &world->scheduler_stack_size);
#endif
    (*world->kernel)();
    Fibre* self = current;
    if (!self->groups.empty() || !self->open.empty()) fail("wgmma still under way at the end of the thread");
    if (!self->chunks.empty()) fail("cp.async that no barrier waits for at the end of the thread");
    if (self->arrived >= 0) fail("an arrival at the cluster's barrier that is not waited for at the end of the thread");
    self->finished = true;
    switch_to_scheduler();
}

void start_fibre(Fibre& fibre) {
    if (free_stacks.empty()) {
        void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for stacks");
        free_stacks.push_back(stack);
    }
    fibre.stack = free_stacks.back();
    free_stacks.pop_back();
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, fibre_main, 0);
}

void resume(Fibre& fibre) {
    current = &fibre;
    fibre.ready = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&world->scheduler_fake, fibre.stack, stack_bytes);
#endif
    swapcontext(&world->scheduler, &fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(world->scheduler_fake, nullptr, nullptr);
#endif
    current = nullptr;
    if (fibre.finished) {
        free_stacks.push_back(fibre.stack);
        --fibre.block->running;
        --fibre.block->cluster->running;
    }
}

void land_one() {
    const size_t which = world->random() % world->flying.size();
    auto copy = std::move(world->flying[which]);
    world->flying[which] = std::move(world->flying.back());
    world->flying.pop_back();
    copy();
    world->progress = true;
}

void meet(Rendezvous& meeting, int threads, std::string what) {
    const u64 generation = meeting.generation;
    if (++meeting.arrived == threads) {
        meeting.arrived = 0;
        ++meeting.generation;
        if (!chance(50)) return;
    }
    wait_until([&meeting, generation] { return meeting.generation != generation; }, std::move(what));
}

u8* shared_at(Block& block, u32 address, u32 bytes) {
    if (address < shared_start || address + bytes > shared_start + block.shared.size()) {
        fail("shared memory access of %u bytes at %u outside [%u, %zu)", bytes, address, shared_start, shared_start + block.shared.size());
    }
    return block.shared.data() + (address - shared_start);
}

void note_ordinary_write(Block& block, u32 address, u32 bytes, Fibre* writer) {
    for (u32 granule = (address - shared_start) / 16; granule <= (address - shared_start + bytes - 1) / 16; ++granule) {
        block.granules[granule] = {world->time, writer};
    }
    ++world->time;
}

template <class T>
void store_shared(u32 address, T value) {
    if (address % sizeof(T)) fail("store of %zu bytes at shared address %u", sizeof(T), address);
    std::memcpy(shared_at(*current->block, address, sizeof(T)), &value, sizeof(T));
    note_ordinary_write(*current->block, address, sizeof(T), current);
}
template <class T>
T load_shared(u32 address) {
    if (address % sizeof(T)) fail("load of %zu bytes at shared address %u", sizeof(T), address);
    T value;
    std::memcpy(&value, shared_at(*current->block, address, sizeof(T)), sizeof(T));
    return value;
}

Barrier& barrier_at(Block& block, u32 address) {
    auto found = block.barriers.find(address);
    if (found == block.barriers.end()) fail("no barrier was initialised at %u", address);
    return found->second;
}

void settle(Barrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        ++barrier.phase;
        barrier.pending = barrier.expected;
    }
}

void arrive(Block& block, u32 address) {
    if (block.running == 0) fail("an arrival at barrier %u of block %d, which has ended", address, block.index);
    Barrier& barrier = barrier_at(block, address);
    if (barrier.pending == 0) fail("barrier %u: an arrival too many", address);
    --barrier.pending;
    settle(barrier);
    world->progress = true;
}

void launch_copy(std::function<void()> copy) {
    const Timing timing = world->launch.copies;
    if (timing == Timing::eager || (timing == Timing::random && chance(25))) {
        copy();
    } else {
        world->flying.push_back(std::move(copy));
    }
}

// 128-byte swizzle: chunk of 16 bytes ^= row of 128 bytes within 1024, both taken from the address. The 64-byte one: chunk among
// 4 ^= row of 128 bytes within 512.
u32 place(u32 linear, u32 width) {
    const u32 chunks = width / 16, chunk = linear / 16 % chunks, row = linear / 128 % chunks;
    return linear / width * width + (chunk ^ row) * 16 + linear % 16;
}

void copy_tensor_box(u32 target, const TensorMap& map, u32 barrier, std::vector<int> corner) {
    const MapFields& m = *reinterpret_cast<const MapFields*>(map.opaque[0]);
    if (static_cast<int>(corner.size()) != m.rank) fail("a box of rank %zu of a map of rank %d", corner.size(), m.rank);
    const bool swizzled = m.element_bytes == 1;
    const u32 width = m.box[0] * m.element_bytes, aligned = swizzled ? 8 * width : 128;
    const i64 first = static_cast<i64>(corner[0]) * m.element_bytes, inside_row = m.dims[0] * m.element_bytes;
    const bool known = swizzled ? width == 64 || width == 128 : width % 16 == 0;
    if (!known || first % 16) fail("inner box of %u bytes at %lld", width, first);
    if (target % aligned) fail("a box at shared address %u, want a multiple of %u", target, aligned);
    u32 rows = 1;
    for (int i = 1; i < m.rank; ++i) rows *= m.box[i];
    Block* const block = current->block;
    // Where each 16 bytes of the box lie; null outside the map. They are read when the box lands, zeros where there are none.
    std::vector<const u8*> sources(rows * width / 16);
    for (u32 row = 0; row < rows; ++row) {
        const u8* from = m.base;
        bool inside = true;
        u32 rest = row;
        for (int i = 1; i < m.rank; ++i) {
            const i64 at = corner[i] + rest % m.box[i];
            rest /= m.box[i];
            inside = inside && at >= 0 && at < m.dims[i];
            from += at * m.strides[i];
        }
        for (u32 byte = 0; byte < width; byte += 16) {
            const i64 at = first + byte;
            if (inside && at >= 0 && at + 16 <= inside_row) sources[(row * width + byte) / 16] = from + at;
            else if (inside && at > -16 && at < inside_row) fail("a box whose edge is no multiple of 16 bytes");
        }
    }
    // What was written in this launch comes as poison where this thread has had no proxy fence since: a box may have it, where
    // others are writing, but nobody may use it.
    for (const u8*& source : sources) {
        const auto found = world->written.find(reinterpret_cast<u64>(source) / 16);
        if (source && found != world->written.end() && current->global_fence_time <= found->second) source = unfenced;
    }
    std::memset(shared_at(*block, target, rows * width), poison, rows * width);
    launch_copy([block, target, rows, width, swizzled, barrier, sources] {
        if (block->running == 0) fail("a box lands in block %d, which has ended", block->index);
        for (u32 i = 0; i < rows * width; i += 16) {
            u8* to = shared_at(*block, swizzled ? place(target + i, width) : target + i, 16);
            if (sources[i / 16]) std::memcpy(to, sources[i / 16], 16);
            else std::memset(to, 0, 16);
        }
        for (u32 granule = 0; granule < rows * width / 16; ++granule) block->granules[(target - shared_start) / 16 + granule] = {};
        Barrier& counted = barrier_at(*block, barrier);
        counted.bytes -= rows * width;
        settle(counted);
        world->progress = true;
    });
}

// Bytes (r, 0 … 31) of an operand, checked for the proxy fence.
void read_row(u64 operand, int row, u8 (&bytes)[32]) {
    const u32 layout = operand >> 62, width = layout == 1 ? 128 : 64;
    if ((layout != 1 && layout != 2) || (operand >> 49 & 7) != 0) fail("descriptor %llx: neither the 128-byte swizzle nor the 64-byte one", operand);
    const u32 start = (operand & 0x3fff) << 4, stride = (operand >> 32 & 0x3fff) << 4;
    const u32 linear = start + row / 8 * stride + row % 8 * width;
    Block& block = *current->block;
    for (int half = 0; half < 2; ++half) {
        const u32 address = place(linear + 16 * half, width);
        std::memcpy(bytes + 16 * half, shared_at(block, address, 16), 16);
        const Granule& granule = block.granules[(address - shared_start) / 16];
        if (granule.writer && current->fence_time <= granule.time && granule.writer->fence_time <= granule.time) {
            fail("wgmma reads shared address %u, written by thread %d without a proxy fence since", address, granule.writer->thread);
        }
    }
}

const float* fp8_table() {
    static float table[256];
    static bool made = false;
    if (!made) {
        for (int code = 0; code < 256; ++code) table[code] = fp8_value(code);
        made = true;
    }
    return table;
}

void execute(Operation& operation) {
    if (operation.done) return;
    operation.done = true;
    const float* value = fp8_table();
    std::vector<float>& d = current->held.at(operation.d);
    const int t = current->thread % 128;
    const int first_row = t / 32 * 16 + t % 32 / 4;
    float a[2][32];
    u8 bytes[32];
    for (int half = 0; half < 2; ++half) {
        read_row(operation.a, first_row + 8 * half, bytes);
        for (int k = 0; k < 32; ++k) a[half][k] = value[bytes[k]];
    }
    for (int group = 0; group < operation.columns / 8; ++group) {
        for (int pair = 0; pair < 2; ++pair) {
            read_row(operation.b, 8 * group + t % 4 * 2 + pair, bytes);
            float sums[2] = {0, 0};
            for (int k = 0; k < 32; ++k) {
                const float b = value[bytes[k]];
                sums[0] += a[0][k] * b;
                sums[1] += a[1][k] * b;
            }
            for (int half = 0; half < 2; ++half) {
                float& target = d[4 * group + 2 * half + pair];
                target = operation.accumulate ? target + sums[half] : sums[half];
            }
        }
    }
}

void report_deadlock() {
    std::map<std::string, int> waiting;
    for (auto& cluster : world->clusters) {
        if (!cluster) continue;
        for (auto& block : cluster->blocks) {
            for (auto& fibre : block->fibres) {
                if (fibre->finished) continue;
                ++waiting["block " + number(block->index) + " warp " + number(fibre->thread / 32) + ": " + fibre->waits_for];
            }
        }
    }
    std::fprintf(stderr, "%s: deadlock\n", world->launch.name);
    for (auto& [what, threads] : waiting) std::fprintf(stderr, "  %s (%d threads)\n", what.c_str(), threads);
    std::exit(3);
}

std::unique_ptr<Cluster> make_cluster(int number) {
    const Launch& launch = world->launch;
    auto cluster = std::make_unique<Cluster>();
    for (int rank = 0; rank < launch.cluster; ++rank) {
        auto block = std::make_unique<Block>();
        block->cluster = cluster.get();
        block->index = number * launch.cluster + rank;
        block->rank = rank;
        block->shared.assign(launch.shared_bytes, poison);
        block->granules.resize(launch.shared_bytes / 16 + 2);
        block->warps.resize(launch.block / 32);
        block->products.resize(launch.block / 128);
        for (int thread = 0; thread < launch.block; ++thread) {
            auto fibre = std::make_unique<Fibre>();
            fibre->block = block.get();
            fibre->thread = thread;
            start_fibre(*fibre);
            block->fibres.push_back(std::move(fibre));
        }
        block->running = launch.block;
        cluster->blocks.push_back(std::move(block));
    }
    cluster->running = launch.cluster * launch.block;
    return cluster;
}

// setmaxnreg takes from and gives to what the launch allotted: 65536 / threads a thread, in steps of 8.
void check_registers(Cluster& cluster) {
    const int allotted = 65536 / world->launch.block / 8 * 8;
    for (auto& block : cluster.blocks) {
        int asked = 0, groups = 0;
        for (size_t thread = 0; thread < block->fibres.size(); thread += 128) {
            asked += block->fibres[thread]->registers;
            groups += block->fibres[thread]->registers != 0;
        }
        const int all = static_cast<int>(block->fibres.size()) / 128;
        if (groups && (groups != all || asked > allotted * all)) {
            fail("setmaxnreg: %d of %d warpgroups ask for %d registers a lane together, the launch has %d", groups, all, asked, allotted * all);
        }
    }
}

}  // namespace

std::vector<std::vector<int>>& asked() {
    static std::vector<std::vector<int>> corners;
    return corners;
}

void fail(const char* format, ...) {
    std::fprintf(stderr, "%s: ", world ? world->launch.name : "emulator");
    if (current) std::fprintf(stderr, "block %d thread %d: ", current->block->index, current->thread);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "\n");
    std::_Exit(2);
}

TensorMap encode(const MapFields* m) {
    if (reinterpret_cast<u64>(m->base) % 16) fail("tensor map: base not a multiple of 16");
    for (int i = 1; i < m->rank; ++i) {
        if (m->strides[i] % 16) fail("tensor map: stride %lld is no multiple of 16", m->strides[i]);
    }
    for (int i = 0; i < m->rank; ++i) {
        if (m->box[i] < 1 || m->box[i] > 256) fail("tensor map: box of %d", m->box[i]);
    }
    TensorMap map{};
    map.opaque[0] = reinterpret_cast<u64>(m);
    return map;
}

void run(const Launch& launch, const std::function<void()>& kernel) {
    World here;
    here.launch = launch;
    here.kernel = &kernel;
    here.random.seed(launch.seed);
    world = &here;
    if (launch.grid % launch.cluster) fail("grid %d is no multiple of cluster %d", launch.grid, launch.cluster);
    const int clusters = launch.grid / launch.cluster;
    int started = 0, finished = 0, sweep = 0, slow_warp = 0;
    // Not with a slow warp in every block, too, or the others would not get ahead of it.
    const int slow_block = launch.uneven && chance(50) ? static_cast<int>(here.random() % std::min(launch.grid, 8)) : -1;
    bool held = slow_block >= 0 && chance(50);  // it does not start before all others can do nothing without it
    here.clusters.resize(clusters);
    while (finished < clusters) {
        while (started < clusters && started - finished < launch.resident) {
            here.clusters[started] = make_cluster(started);
            ++started;
        }
        here.progress = false;
        std::vector<Fibre*> order;
        for (auto& cluster : here.clusters) {
            if (!cluster) continue;
            for (auto& block : cluster->blocks) {
                for (auto& fibre : block->fibres) {
                    if (!fibre->finished) order.push_back(fibre.get());
                }
            }
        }
        // From a random thread on, forwards or backwards; now and then one is left out. One warp is far slower than the
        // others for a while: whatever depends on its keeping up without a barrier shows.
        if (sweep++ % 64 == 0) slow_warp = static_cast<int>(here.random() % (launch.block / 32));
        const size_t offset = here.random() % (order.empty() ? 1 : order.size());
        const bool backwards = chance(50);
        for (size_t i = 0; i < order.size(); ++i) {
            Fibre& fibre = *order[((backwards ? order.size() - 1 - i : i) + offset) % order.size()];
            if (fibre.ready && !fibre.ready()) continue;
            if (fibre.block->index == slow_block && (held || chance(97))) continue;
            if (chance(slow_block < 0 && fibre.thread / 32 == slow_warp ? 97 : 5)) continue;
            here.progress = true;
            resume(fibre);
            if (launch.copies == Timing::random && !here.flying.empty() && chance(10)) land_one();
        }
        if (!here.progress) {
            bool skipped = false;
            for (Fibre* fibre : order) {
                if (held && fibre->block->index == slow_block) continue;
                skipped = skipped || !fibre->ready || fibre->ready();
            }
            if (!skipped) {
                if (!here.flying.empty()) land_one();
                else if (held) held = false;
                else report_deadlock();
            }
        }
        for (auto& cluster : here.clusters) {
            if (cluster && cluster->running == 0) {
                check_registers(*cluster);
                cluster.reset();
                ++finished;
            }
        }
    }
    if (!here.flying.empty()) fail("%zu copies still under way at the end", here.flying.size());
    world = nullptr;
}

void mma(float* d, int columns, u64 a, u64 b, bool accumulate) {
    Fibre& self = *current;
    // The instruction belongs to the warpgroup: all its threads issue the same.
    auto& issued = self.block->products[self.thread / 128];
    const u64 mark = a * 1000003 ^ b * 999983 ^ static_cast<u64>(columns) << 1 ^ accumulate;
    if (issued.size() == self.products) issued.push_back(mark);
    if (issued[self.products++] != mark) fail("wgmma %zu differs within its warpgroup", self.products - 1);
    if (!self.held.count(d)) self.held[d].assign(d, d + columns / 2);
    for (int i = 0; i < columns / 2; ++i) d[i] = NAN;
    self.open.push_back({d, columns, a, b, accumulate, false});
    const Timing timing = world->launch.products;
    if (timing == Timing::eager || (timing == Timing::random && chance(30))) {
        for (auto& group : self.groups) {
            for (auto& operation : group) execute(operation);
        }
        for (auto& operation : self.open) execute(operation);
    }
}

void mma_wait(int left) {
    Fibre& self = *current;
    while (static_cast<int>(self.groups.size()) > left) {
        for (auto& operation : self.groups.front()) execute(operation);
        self.groups.pop_front();
    }
    for (auto held = self.held.begin(); held != self.held.end();) {
        bool busy = false;
        for (auto& group : self.groups) {
            for (auto& operation : group) busy = busy || operation.d == held->first;
        }
        for (auto& operation : self.open) busy = busy || operation.d == held->first;
        if (busy) {
            ++held;
        } else {
            std::copy(held->second.begin(), held->second.end(), held->first);
            held = self.held.erase(held);
        }
    }
    warp_sync();
}

void registers(int count) { current->registers = count; }

float fp8_value(u8 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float value;
    if (exponent == 15 && mantissa == 7) {
        value = NAN;
    } else if (exponent == 0) {
        value = std::ldexp(static_cast<float>(mantissa), -9);
    } else {
        value = std::ldexp(1.0f + mantissa / 8.0f, exponent - 7);
    }
    return code & 128 ? -value : value;
}

u8 fp8_code(float value) {
    const u8 sign = std::signbit(value) ? 128 : 0;
    const float size = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7f;
    if (size >= 448.0f) return sign | 0x7e;
    int exponent;
    std::frexp(size, &exponent);
    const int step = std::max(exponent - 1, -6) - 3;
    const float rounded = std::ldexp(std::nearbyint(std::ldexp(size, -step)), step);
    if (rounded >= 448.0f) return sign | 0x7e;
    if (rounded < std::ldexp(1.0f, -6)) return sign | static_cast<u8>(std::ldexp(rounded, 9));
    std::frexp(rounded, &exponent);
    const int mantissa = static_cast<int>(std::ldexp(rounded, 3 - (exponent - 1))) - 8;
    return sign | static_cast<u8>((exponent - 1 + 7) << 3 | mantissa);
}

float bf16_value(u16 bits) {
    const u32 word = static_cast<u32>(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

u16 bf16_bits(float value) {
    u32 word;
    std::memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<u16>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace emulate

namespace glm_hopper {

using namespace emulate;

int thread_index() { return current->thread; }
int block_index() { return current->block->index; }
int grid_size() { return world->launch.grid; }
int cluster_rank() { return current->block->rank; }

static u32 exchange(u32 value, int from) {
    const int lane = current->thread % 32;
    Warp& warp = current->block->warps[current->thread / 32];
    const u64 turn = warp.meet.generation % 2;
    warp.value[turn][lane] = value;
    meet(warp.meet, 32, "the warp");
    return warp.value[turn][from];
}

int warp_uniform(int value) { return static_cast<int>(exchange(static_cast<u32>(value), 0)); }
u32 shuffle_xor(u32 value, int mask) { return exchange(value, (current->thread % 32) ^ mask); }
float shuffle_xor(float value, int mask) {
    u32 word;
    std::memcpy(&word, &value, 4);
    return bits_to_float(shuffle_xor(word, mask));
}
int shuffle(int value, int lane) { return static_cast<int>(exchange(static_cast<u32>(value), lane)); }
int shuffle_up(int value, int lanes) {
    if (lanes < 0 || lanes > 31) fail("shuffle_up by %d lanes", lanes);
    const int lane = current->thread % 32;
    return static_cast<int>(exchange(static_cast<u32>(value), lane < lanes ? lane : lane - lanes));
}
u32 ballot(bool value) {
    const Warp& warp = current->block->warps[current->thread / 32];
    const u64 turn = warp.meet.generation % 2;
    exchange(value, 0);  // afterwards all 32 votes lie there until the exchange after the next
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= warp.value[turn][lane] << lane;
    return bits;
}
void warp_sync() { meet(current->block->warps[current->thread / 32].meet, 32, "the warp"); }

u32 shared_base() { return shared_start; }
int load_shared_int(u32 address) { return load_shared<int>(address); }
int load_shared_int_of(u32 address, int rank) {
    auto& blocks = current->block->cluster->blocks;
    if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("a load from block %d of the cluster", rank);
    if (address % 4) fail("load of 4 bytes at shared address %u", address);
    Block& other = *blocks[rank];
    if (other.running == 0) fail("a load from shared memory of block %d, which has ended", other.index);
    int value;
    std::memcpy(&value, shared_at(other, address, 4), 4);
    return value;
}
float load_shared_float(u32 address) { return load_shared<float>(address); }
Float2 load_shared_2(u32 address) { return load_shared<Float2>(address); }
Vector4 load_shared_16(u32 address) { return load_shared<Vector4>(address); }
void store_shared_int(u32 address, int value) { store_shared(address, value); }
void store_shared_float(u32 address, float value) { store_shared(address, value); }
void store_shared_u16(u32 address, u16 value) { store_shared(address, value); }
void store_shared_8(u32 address, Vector2 value) { store_shared(address, value); }
// What a lane holds of row lane / 4 of a matrix goes where lane % 8 of that matrix's eight lanes says.
void store_matrices(u32 address, const u32 (&v)[4]) {
    if (address % 16) fail("a matrix' row at shared address %u", address);
    const int lane = current->thread % 32;
    for (int matrix = 0; matrix < 4; ++matrix) {
        store_shared(exchange(address, 8 * matrix + lane / 4) + 4 * (lane % 4), v[matrix]);
    }
}

template <class T>
static T load_global(const void* pointer) {
    if (reinterpret_cast<u64>(pointer) % sizeof(T)) fail("global load of %zu bytes at %p", sizeof(T), pointer);
    return *static_cast<const T*>(pointer);
}
template <class T>
static void store_global(void* pointer, T value) {
    if (reinterpret_cast<u64>(pointer) % sizeof(T)) fail("global store of %zu bytes at %p", sizeof(T), pointer);
    *static_cast<T*>(pointer) = value;
    world->written[reinterpret_cast<u64>(pointer) / 16] = world->time++;
}
Vector4 load_fresh_16(const void* pointer) { return load_global<Vector4>(pointer); }
int load_fresh_int(const int* pointer) { return load_global<int>(pointer); }
Vector4 load_once_16(const void* pointer) { return load_global<Vector4>(pointer); }
Vector4 load_16(const void* pointer) { return load_global<Vector4>(pointer); }
void touch(const float* pointer) { load_global<float>(pointer); }
// Only that it lies in the tensor: AddressSanitizer sees it.
void ask_for_line(const u8* pointer) {
    if (reinterpret_cast<u64>(pointer) % 16) fail("a line is asked for at %p", static_cast<const void*>(pointer));
    static_cast<void>(*static_cast<const volatile u8*>(pointer));
}
Float2 load_constant_2(const float* pointer) { return load_global<Float2>(pointer); }
void store_16(void* pointer, Vector4 value) { store_global(pointer, value); }
void store_8(void* pointer, Vector2 value) { store_global(pointer, value); }
int atomic_next(int* counter) { return (*counter)++; }
void release_add(int* counter) {
    ++*counter;
    world->progress = true;
}
void acquire_at_least(const int* counter, int target) {
    wait_until([=] { return *counter >= target; }, "a counter to reach " + std::to_string(target));
}

void fence_proxy_async() { current->fence_time = world->time++; }
void fence_proxy_async_global() { current->global_fence_time = world->time++; }

u32 permute_bytes(u32 low, u32 high, u32 selector) {
    const u64 both = static_cast<u64>(high) << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<u32>(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    return result;
}
float divide_exactly(float a, float b) { return a / b; }
float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
float exponential(float x) { return std::exp(x); }
float divide_fast(float a, float b) { return a / b; }
float larger(float a, float b) { return std::fmax(a, b); }
float smaller(float a, float b) { return std::fmin(a, b); }
float magnitude(float a) { return std::fabs(a); }
float bits_to_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
u32 float_to_bits(float a) {
    u32 bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
u16 pack_fp8(float first, float second) { return static_cast<u16>(fp8_code(first) | fp8_code(second) << 8); }
u32 pack_bf16(float first, float second) { return bf16_bits(first) | static_cast<u32>(bf16_bits(second)) << 16; }

void barrier_init(u32 barrier, u32 arrivals) {
    if (barrier % 8) fail("barrier at %u", barrier);
    shared_at(*current->block, barrier, 8);
    if (current->block->barriers.count(barrier)) fail("barrier %u initialised twice", barrier);
    current->block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
void barrier_init_done() {}
void barrier_expect(u32 barrier, u32 bytes) {
    barrier_at(*current->block, barrier).bytes += bytes;
    arrive(*current->block, barrier);
}
void barrier_arrive(u32 barrier) { arrive(*current->block, barrier); }
void send_shared_float(u32 address, float value, u32 barrier, u32 rank) {
    auto& blocks = current->block->cluster->blocks;
    if (rank >= blocks.size()) fail("a value for block %u of the cluster", rank);
    if (address % 4) fail("a value for shared address %u", address);
    Block* other = blocks[rank].get();
    barrier_at(*other, barrier);
    std::memset(shared_at(*other, address, 4), poison, 4);
    launch_copy([other, address, value, barrier] {
        if (other->running == 0) fail("a value comes to block %d, which has ended", other->index);
        std::memcpy(shared_at(*other, address, 4), &value, 4);
        Barrier& counted = barrier_at(*other, barrier);
        counted.bytes -= 4;
        settle(counted);
        world->progress = true;
    });
}
void barrier_wait(u32 barrier, u32 parity) {
    Barrier& waited = barrier_at(*current->block, barrier);
    wait_until([&waited, parity] { return (waited.phase & 1) != parity; },
               "barrier " + std::to_string(barrier) + " parity " + std::to_string(parity));
}
void named_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % 32) fail("named barrier %d of %d threads", id, threads);
    int& agreed = current->block->named_threads[id];
    if (agreed == 0) agreed = threads;
    if (agreed != threads) fail("named barrier %d of %d and of %d threads", id, agreed, threads);
    meet(current->block->named[id], threads, "named barrier " + std::to_string(id));
}
void block_barrier() { meet(current->block->all, world->launch.block, "the block"); }
void cluster_arrive() {
    Rendezvous& meeting = current->block->cluster->all;
    if (current->arrived >= 0) fail("a second arrival at the cluster's barrier without a wait");
    current->arrived = static_cast<i64>(meeting.generation);
    if (++meeting.arrived == world->launch.block * world->launch.cluster) {
        meeting.arrived = 0;
        ++meeting.generation;
        world->progress = true;
    }
}
void cluster_wait() {
    const Rendezvous& meeting = current->block->cluster->all;
    if (current->arrived < 0) fail("a wait at the cluster's barrier without an arrival");
    const u64 generation = static_cast<u64>(current->arrived);
    wait_until([&meeting, generation] { return meeting.generation != generation; }, "the cluster");
    current->arrived = -1;
}
void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

// Kept, for a check to look at (emulate::asked); a corner must lie in the tensor.
static void ask_for_tensor_box(const TensorMap& map, std::initializer_list<int> corner) {
    const MapFields& m = *reinterpret_cast<const MapFields*>(map.opaque[0]);
    if (m.rank != static_cast<int>(corner.size())) fail("a box of %zu dimensions of a tensor of %d", corner.size(), m.rank);
    int i = 0;
    for (int at : corner) {
        if (at < 0 || at >= m.dims[i]) fail("a box is asked for at %d of dimension %d", at, i);
        ++i;
    }
    emulate::asked().emplace_back(corner);
}
void ask_for_box(const TensorMap& map, int c0, int c1, int c2) { ask_for_tensor_box(map, {c0, c1, c2}); }
void ask_for_box(const TensorMap& map, int c0, int c1, int c2, int c3) { ask_for_tensor_box(map, {c0, c1, c2, c3}); }
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1) {
    copy_tensor_box(target, map, barrier, {c0, c1});
}
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2) {
    copy_tensor_box(target, map, barrier, {c0, c1, c2});
}
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3) {
    copy_tensor_box(target, map, barrier, {c0, c1, c2, c3});
}
void copy_box(u32 target, const TensorMap& map, u32 barrier, int c0, int c1, int c2, int c3, int c4) {
    copy_tensor_box(target, map, barrier, {c0, c1, c2, c3, c4});
}

void copy_chunk(u32 target, const u8* source) {
    if (target % 16 || reinterpret_cast<u64>(source) % 16) fail("cp.async from %p to %u", static_cast<const void*>(source), target);
    std::memset(shared_at(*current->block, target, 16), poison, 16);
    current->chunks.emplace_back(target, source);
}
void copies_arrive(u32 barrier) {
    Fibre* self = current;
    launch_copy([self, barrier, chunks = std::move(self->chunks)] {
        for (auto& [target, source] : chunks) {
            std::memcpy(shared_at(*self->block, target, 16), source, 16);
            note_ordinary_write(*self->block, target, 16, self);
        }
        arrive(*self->block, barrier);
    });
    self->chunks.clear();
}

void copy_in(u32 target, const void* source, u32 bytes, u32 barrier) {
    Block* block = current->block;
    const u8* from = static_cast<const u8*>(source);
    if (reinterpret_cast<u64>(source) % 16 || target % 16 || bytes % 16 || !bytes) {
        fail("bulk copy of %u bytes from %p to %u", bytes, source, target);
    }
    std::memset(shared_at(*block, target, bytes), poison, bytes);
    launch_copy([block, target, from, bytes, barrier] {
        if (block->running == 0) fail("a bulk copy lands in block %d, which has ended", block->index);
        std::memcpy(shared_at(*block, target, bytes), from, bytes);
        for (u32 granule = 0; granule < bytes / 16; ++granule) block->granules[(target - shared_start) / 16 + granule] = {};
        Barrier& counted = barrier_at(*block, barrier);
        counted.bytes -= bytes;
        settle(counted);
        world->progress = true;
    });
}

void mma_commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}

}  // namespace glm_hopper
