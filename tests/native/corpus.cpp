// A conservation law: virtual calls, std::vector, a switch.
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>
struct Law { virtual double flux(double u) const = 0; virtual ~Law() {} };
struct Quadratic : Law { double flux(double u) const override { return 0.5 * u * u; } };
struct Buckley : Law {
    double a;
    Buckley(double a) : a(a) {}
    double flux(double u) const override { double w = 1 - u; return u * u / (u * u + a * w * w); }
};
extern "C" double law(const double *x, int n, int kind, int steps) {
    std::unique_ptr<Law> law;
    switch (kind) {
        case 0: law.reset(new Quadratic); break;
        case 1: law.reset(new Buckley(0.5 + x[0] * x[0])); break;
        case 2: law.reset(new Buckley(1.0)); break;
        case 3: law.reset(new Buckley(2.0)); break;
        case 4: law.reset(new Buckley(x[1])); break;
        default: return 0;
    }
    std::vector<double> u(x, x + n), f(n + 1);
    for (int t = 0; t < steps; t++) {
        for (int i = 0; i <= n; i++) {
            double l = u[(i + n - 1) % n], r = u[i % n];
            f[i] = 0.5 * (law->flux(l) + law->flux(r)) - 0.3 * (r - l);
        }
        for (int i = 0; i < n; i++) u[i] -= 0.2 * (f[i + 1] - f[i]);
    }
    return std::inner_product(u.begin(), u.end(), u.begin(), 0.0);
}
// An exception that is thrown and caught.
extern "C" double caught(const double *x) {
    try { if (x[0] > 0) throw 3; return x[0]; } catch (int n) { return n * x[0]; }
}
