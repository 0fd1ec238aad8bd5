// Memory for the packed operands of a product.
//
// Pieces of 2 MB and more are whole huge pages; below that, clearing a huge page took longer (100
// us) than the product. Pieces of up to 16 MB are kept for the next product, four of them: without
// faults of fresh pages the three products of a 1024^3 layer took 9.5 ms instead of 10.8. Sizes are
// rounded to a power of two or three quarters of it, so that layers of similar sizes share.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "../lanes.h"

NVFP4_BEGIN

class Workspace {
public:
    explicit Workspace(size_t bytes) : bytes_(rounded(bytes)), data_(kept().take(bytes_)) {
        if (data_) return;
        const bool huge = bytes_ >= kHugePage;
        data_ = std::aligned_alloc(huge ? kHugePage : 64, bytes_);
        if (!data_) throw std::bad_alloc();
        if (huge) madvise(data_, bytes_, MADV_HUGEPAGE);
    }
    ~Workspace() {
        if (!kept().put(bytes_, data_)) std::free(data_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    template <class Cell>
    Cell* cells() const {
        return static_cast<Cell*>(data_);
    }

private:
    static constexpr size_t kHugePage = size_t{1} << 21;
    static constexpr size_t kLargest = size_t{1} << 24;  // that is kept
    static constexpr int kSlots = 4;                     // for two products at a time

    class Kept {
    public:
        void* take(size_t bytes) {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (Slot& slot : slots_)
                if (slot.data && slot.bytes == bytes) return std::exchange(slot.data, nullptr);
            return nullptr;
        }
        bool put(size_t bytes, void* data) {
            if (bytes > kLargest) return false;
            const std::lock_guard<std::mutex> lock(mutex_);
            Slot& slot = slots_[next_++ % kSlots];  // what lay here longest goes
            std::free(slot.data);
            slot = {bytes, data};
            return true;
        }

    private:
        struct Slot {
            size_t bytes = 0;
            void* data = nullptr;
        };
        std::mutex mutex_;
        Slot slots_[kSlots];
        unsigned next_ = 0;
    };

    static size_t rounded(size_t bytes) {
        size_t size = 4096;
        while (size < bytes) size *= 2;
        const size_t less = size / 4 * 3;
        return less >= bytes && less % (size < kHugePage ? 64 : kHugePage) == 0 ? less : size;
    }
    static Kept& kept() {
        static Kept* all = new Kept;  // never destroyed: products may run while the process ends
        return *all;
    }

    size_t bytes_;
    void* data_;
};

NVFP4_END
