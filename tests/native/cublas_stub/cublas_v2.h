#pragma once
// names of cuBLAS that ggml-cuda mentions: enough to compile its files where the toolkit has no cuBLAS
#include <cuda_runtime.h>
#include <library_types.h>

#define CUBLAS_VER_MAJOR 13
#define CUBLAS_VER_MINOR 0

typedef struct cublasContext * cublasHandle_t;
typedef enum {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH,
    CUBLAS_STATUS_MAPPING_ERROR,
    CUBLAS_STATUS_EXECUTION_FAILED,
    CUBLAS_STATUS_INTERNAL_ERROR,
    CUBLAS_STATUS_NOT_SUPPORTED,
} cublasStatus_t;
typedef enum { CUBLAS_TENSOR_OP_MATH, CUBLAS_TF32_TENSOR_OP_MATH } cublasMath_t;
typedef enum { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F } cublasComputeType_t;

cublasStatus_t cublasCreate_v2(cublasHandle_t * handle);
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode);
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream);
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void * workspace, size_t size);
const char * cublasGetStatusString(cublasStatus_t status);

enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT_TENSOR_OP };

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle);
template <typename... T> cublasStatus_t cublasSgemm(T... args);
template <typename... T> cublasStatus_t cublasGemmEx(T... args);
template <typename... T> cublasStatus_t cublasGemmBatchedEx(T... args);
template <typename... T> cublasStatus_t cublasGemmStridedBatchedEx(T... args);

#define cublasDestroy      cublasDestroy_v2
#define cublasCreate       cublasCreate_v2
#define cublasSetStream    cublasSetStream_v2
#define cublasSetWorkspace cublasSetWorkspace_v2
