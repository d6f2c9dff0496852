/* Functions that are lifted by tests/test_native.py; the same formulas stand there in torch. */
#define _GNU_SOURCE
#include <complex.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* loops, a branch, sqrt, fabs, negation */
double loop(const double *x, int n) {
    double s = 0, p = 1;
    for (int i = 0; i < n; i++) {
        double v = x[i];
        if (v > 0.5) s += v * v * v; else s -= v / (1.0 + v * v);
        p *= 0.5 * v + 1.0 / (2.0 + fabs(v));
    }
    return sqrt(s * s + p * p) + -s;
}

/* libm */
double transcendental(const double *x, int n) {
    double s = 0;
    for (int i = 0; i + 1 < n; i++)
        s += exp(-x[i] * x[i]) * sin(x[i + 1]) + log(1.0 + x[i] * x[i]) + pow(fabs(x[i]) + 1.0, x[i + 1])
           + tanh(x[i] * x[i + 1]) + atan2(x[i], 2.0 + cos(x[i + 1]));
    return s;
}

/* packed code at -O3 */
double rosenbrock(const double *x, int n) {
    double s = 0;
    for (int i = 0; i + 1 < n; i++) { double a = x[i + 1] - x[i] * x[i], b = 1 - x[i]; s += 100 * a * a + b * b; }
    return s;
}

/* viscous Burgers' equation: heap, memcpy, upwind differences; par: amplitudes of the initial state, and viscosity */
double burgers(const double *par, int m, int n, int steps) {
    double *u = malloc(n * sizeof(double)), *w = malloc(n * sizeof(double));
    double h = 1.0 / (n - 1), nu = 0.002 + 0.01 * par[m - 1] * par[m - 1], dt = 0.2 * h;
    for (int i = 0; i < n; i++) {
        double s = 0, z = i * h;
        for (int k = 0; k + 1 < m; k++) s += par[k] * sin((k + 1) * 3.14159265358979 * z);
        u[i] = s;
    }
    for (int t = 0; t < steps; t++) {
        for (int i = 1; i < n - 1; i++) {
            double c = u[i], dudx = c > 0 ? (c - u[i - 1]) / h : (u[i + 1] - c) / h;
            w[i] = c + dt * (nu * (u[i + 1] - 2 * c + u[i - 1]) / (h * h) - c * dudx);
        }
        w[0] = w[n - 1] = 0;
        memcpy(u, w, n * sizeof(double));
    }
    double e = 0;
    for (int i = 0; i < n; i++) e += u[i] * u[i] * h;
    free(u); free(w);
    return sqrt(e);
}

/* a table, function pointers, recursion, conversions, extremes, copysign, a switch, realloc */
static const double table[8] = {0, 1, 4, 9, 16, 25, 36, 49};
__attribute__((noinline)) static double interpolated(double x) {
    if (x < 0) x = 0;
    if (x > 6.999) x = 6.999;
    int i = (int)x; double f = x - i;
    return table[i] * (1 - f) + table[i + 1] * f;
}
__attribute__((noinline)) static double square(double x) { return x * x; }
__attribute__((noinline)) static double recursive(double x, int k) { return k == 0 ? x : x * recursive(x * 0.5 + 1, k - 1); }
__attribute__((noinline)) static double chosen(double x, int k) {
    switch (k) {
        case 0: return x * x;
        case 1: return 3 * x;
        case 2: return x * x * x;
        case 3: return 1 / (2 + x);
        case 4: return x - 7;
        case 5: return x * x - x;
        default: return -x;
    }
}
typedef double (*function)(double);
double control(const double *x, int n) {
    volatile function f = n > 1 ? interpolated : square;
    double s = 0, *kept = malloc(8);
    for (int i = 0; i < n; i++) {
        s += f(fabs(x[i]) * 3) + recursive(x[i], 3) + fmax(x[i], 0.25) * fmin(x[i], 0.75) + copysign(x[i] * x[i], -x[i]);
        kept = realloc(kept, 8 * (i + 1) * 5);
        kept[i] = chosen(x[i], i);
    }
    for (int i = 0; i < n; i++) s += kept[i] * (i + 1) + (long)(x[i] * 100) % 7 / 3 + (x[i] > 0 ? ldexp(x[i], i - 2) : 0);
    free(kept);
    return s;
}

/* results in arrays and numbers by value, more of them than there are registers */
int many(const double *a, double b, int n, double *out, long k, double c, unsigned char flag, double *both, int m,
         double d, double e, double f, double g, double h, double i, double j, long last) {
    for (int q = 0; q < n; q++) out[q] = a[q] * b + c * d - e * f + g * h * i * j + k;
    for (int q = 0; q < m; q++) both[q] = both[q] * both[q] * b + flag;
    return n + m + (int)last;
}

/* Fortran's way: everything by reference */
void axpy_(const int *n, const double *a, const double *x, double *y) {
    for (int i = 0; i < *n; i++) y[i] += *a * x[i];
}

/* what is refused, or carried by a rule of the user's */
double inverse_root(const double *x) {
    double half = 0.5 * x[0]; long bits; memcpy(&bits, x, 8);
    bits = 0x5fe6eb50c7b537a9 - (bits >> 1);
    double y; memcpy(&y, &bits, 8);
    return y * (1.5 - half * y * y);
}
double in_single(const double *x) { return (float)x[0] * 2.0; }
double extended(const double *x) { long double y = x[0]; return (double)(y * y); }
double halves(const double *x) {
    volatile union { double d; int i[2]; } u; u.d = x[0] * 1.5; u.i[0] = 0; return u.d * x[0];
}
double *outside;
void prepare(void) { outside = malloc(64); }
double stored(const double *x) { outside[0] = x[0] * x[0]; return outside[0]; }
static double memory[4];
double kept(const double *x) { memory[1] = x[0] * x[0]; memory[2] = 3; return memory[1] * memory[2]; }
double unknown(const double *x) { return significand(x[0]); }
static int calls;
double impure(const double *x) { return x[0] * ++calls; }
double special(const double *x) { return x[0] == 2 ? 4 : x[0] * x[0]; }
__attribute__((noinline)) double mine(double x) { long b; memcpy(&b, &x, 8); b += 1L << 52; memcpy(&x, &b, 8); return x; }
double with_rule(const double *x) { return mine(x[0]) * x[0]; }
double large(const double *x, long n) { volatile double *p = malloc(n); p[0] = x[0]; return p[0]; }
double mantissa(const double *x) { int e; double m = frexp(x[0], &e); double w; return m * m + e + modf(x[0] * 3, &w) * x[0]; }
double low_bits(const double *x) {
    long b; memcpy(&b, x, 8); b &= 0xfffffffff8000000; double h; memcpy(&h, &b, 8); return h * h + 2 * h * (x[0] - h);
}

/* arrays of the library's own that lie in two mappings of memory, the file's and a zeroed one */
static double first_array[3000], second_array[3000];
double arrays(const double *x, int n) {
    double s = 0;
    for (int i = 0; i < 3000; i++) first_array[i] = x[i % n] * x[(i + 1) % n] * i * 1e-3;
    memcpy(second_array, first_array, sizeof first_array);
    memset(first_array, 0, sizeof first_array);
    for (int i = 0; i < 3000; i++) s += second_array[i] * second_array[i] + first_array[i];
    return s * 1e-3;
}
/* the upper half of a double whose lower half was overwritten is still the double's */
double upper_half(const double *x) {
    volatile union { double d; int i[2]; } u; u.d = x[0]; u.i[0] = 0; return u.i[1] * 1e-6;
}
/* right in the first input, and wrong in others: bits that are made of integers, a result that was kept */
double made_bits(const double *x) {
    long i = (long)(6497320848556798.0 * x[1] + 4606985713057410560.0); double d; memcpy(&d, &i, 8); return d + x[0];
}
double remembered(const double *x) {
    static double key, value; if (key != x[1]) { key = x[1]; value = exp(x[1]); } return value + x[0];
}
/* right in the first and large output, wrong in the second and small one */
void small_output(const double *x, double *out) {
    volatile double big = 6755399441055744.0; out[0] = 1e6 * x[0] * x[1]; out[1] = 1e-3 * (x[1] - ((x[1] + big) - big));
}
/* a sort that calls back, text, errno, random numbers, complex numbers, functions with integers */
static int compared(const void *a, const void *b) { double p = *(double *)a, q = *(double *)b; return (p > q) - (p < q); }
double sorted(const double *x, int n) {
    double y[200], s = 0; char text[32];
    for (int i = 0; i < 200; i++) y[i] = x[i % n] * (i * 37 % 200);
    qsort(y, 200, sizeof(double), compared);
    strcpy(text, "abc"); strcat(text, "de"); srand(3); errno = 0;
    for (int i = 0; i < 200; i++) s += y[i] * y[i] * i;
    return s * 1e-5 * strlen(text) + (errno ? 1 : 0) + 0 * (rand() % 2) * x[0];
}
double in_the_plane(const double *x, int n) {
    double complex z = x[0] + I * x[1], w = x[2] + I * x[3];
    z = cexp(z * 0.3) + csqrt(z) + clog(w) + csin(z) * ccos(w) + csinh(w) - ccosh(z * 0.2) + ctan(w) + ctanh(z) + cpow(w, z * 0.1);
    return creal(z) * cimag(z) + carg(w) + cabs(z / (2 + w));
}
double with_integers(const double *x, int n) {
    int q, s; double a = fabs(x[1]) + 1;
    return jn(3, a) + yn(2, a) + remquo(a, 0.3, &q) + lgamma_r(a, &s) * s + nextafter(x[0], 2) + q * x[2] + sqrtf(n) * x[3];
}

/* all functions with a rule */
void functions(const double *p, double *out) {
    double x = p[0], y = p[1]; int e; int k = 0;
    out[k++] = exp(x); out[k++] = exp2(x); out[k++] = expm1(x); out[k++] = log(x); out[k++] = log2(x);
    out[k++] = log10(x); out[k++] = log1p(x); out[k++] = sin(x); out[k++] = cos(x); out[k++] = tan(x);
    out[k++] = asin(x); out[k++] = acos(x); out[k++] = atan(x); out[k++] = sinh(x); out[k++] = cosh(x);
    out[k++] = tanh(x); out[k++] = asinh(x); out[k++] = acosh(1 + x); out[k++] = atanh(x); out[k++] = cbrt(x);
    out[k++] = erf(x); out[k++] = erfc(x); out[k++] = j0(x); out[k++] = j1(x); out[k++] = y0(x);
    out[k++] = y1(x); out[k++] = tgamma(x); out[k++] = lgamma(x); out[k++] = lgamma(x - 2.5); out[k++] = sqrt(x);
    out[k++] = pow(x, y); out[k++] = pow(-x, 3.0); out[k++] = atan2(y, x); out[k++] = atan2(-y, -x);
    out[k++] = hypot(x, y); out[k++] = fmod(5 * y, x); out[k++] = fma(x, y, x); out[k++] = frexp(x * y, &e);
    out[k++] = fdim(y, x); out[k++] = remainder(7 * y, x); out[k++] = floor(3 * x) * x; out[k++] = log(x) * lround(9 * x);
}
