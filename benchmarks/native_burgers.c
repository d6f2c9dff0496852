/* Burgers' equations in two dimensions, upwind, on an n x n grid, explicit in time; the norm of the last state. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

static double exact_u(int i, int j, double h, double t) { double x = i * h, y = j * h; return (x + y - 2 * x * t) / (1 - 2 * t * t); }
static double exact_v(int i, int j, double h, double t) { double x = i * h, y = j * h; return (x - y - 2 * y * t) / (1 - 2 * t * t); }

static void boundary(double *u, double *v, int n, double h, double t) {
    for (int g = 0; g < n; g++) {
        const int places[4][2] = {{g, 0}, {g, n - 1}, {0, g}, {n - 1, g}};
        for (int e = 0; e < 4; e++) {
            const int i = places[e][0], j = places[e][1];
            u[i + j * n] = exact_u(i, j, h, t);
            v[i + j * n] = exact_v(i, j, h, t);
        }
    }
}

static void step(double *next, const double *w, const double *u, const double *v, int n, double a, double b) {
    for (int j = 1; j < n - 1; j++)
        for (int i = 1; i < n - 1; i++) {
            const int q = i + j * n;
            const double p = u[q] >= 0 ? u[q] * (w[q] - w[q - 1]) : u[q] * (w[q + 1] - w[q]);
            const double r = v[q] >= 0 ? v[q] * (w[q] - w[q - n]) : v[q] * (w[q + n] - w[q]);
            next[q] = w[q] - a * (p + r) + b * (w[q + 1] + w[q - 1] + w[q + n] + w[q - n] - 4 * w[q]);
        }
}

double burgers2d(const double *u0, const double *v0, int n, int steps) {
    const size_t bytes = (size_t)n * n * sizeof(double);
    double *u = malloc(bytes), *v = malloc(bytes), *u2 = malloc(bytes), *v2 = malloc(bytes);
    const double h = 50.0 / (n - 1), dt = 1e-4;
    double t = 0, a = 0, b = 0;
    memcpy(u, u0, bytes); memcpy(v, v0, bytes); memcpy(u2, u, bytes); memcpy(v2, v, bytes);
    for (int k = 0; k < steps; k++) {
        step(u2, u, u, v, n, dt / h, dt / (h * h));
        step(v2, v, u, v, n, dt / h, dt / (h * h));
        t += dt;
        boundary(u2, v2, n, h, t);
        double *s = u; u = u2; u2 = s;
        s = v; v = v2; v2 = s;
    }
    for (int j = 1; j < n - 1; j++)
        for (int i = 1; i < n - 1; i++) { a += u[i + j * n] * u[i + j * n]; b += v[i + j * n] * v[i + j * n]; }
    free(u); free(v); free(u2); free(v2);
    return (sqrt(a) + sqrt(b)) / (n * n);
}
