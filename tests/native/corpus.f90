! Fortran: whole arrays, matmul, modules and common blocks, complex numbers, intrinsics.
module state
  double precision :: shared(100)
end module
subroutine logistic(n, p, out) bind(c)
  use iso_c_binding
  integer(c_int), value :: n
  real(c_double), intent(in) :: p(n)
  real(c_double), intent(out) :: out(n)
  real(c_double), allocatable :: a(:,:), b(:)
  integer :: i, j
  allocate(a(n,n), b(n))
  do i=1,n
    do j=1,n
      a(i,j) = p(i)*sin(p(j)) + merge(2d0, 0d0, i==j)
    end do
  end do
  b = matmul(a, p)
  out = b*dot_product(p,p) + sum(a, dim=1) + maxval(p)*minval(b) + p**3 + abs(b)**1.5d0 + sign(p, b) + mod(b, 0.7d0) &
      + norm2(p) + erf(p) + bessel_j0(p) + gamma(1+p*p) + hypot(p, b) + atan2(p, b) + anint(p*10) + nint(p*3)*p &
      + reshape(transpose(spread(p,2,2)), [n])
  deallocate(a, b)
end subroutine
subroutine common(n, p, out)
  use state
  integer :: n, i
  double precision :: p(n), out(n), w(4), block(8)
  complex(kind(1d0)) :: z
  common /blk/ block
  save w
  shared(1:n) = p*p
  block(1) = p(1)
  z = cmplx(p(1), p(2), kind(1d0))
  z = exp(z)*sqrt(z) + z**2 + z**(0.3d0,0.1d0)
  where (p > 0.3d0)
    w = shared(1:n)*block(1)
  elsewhere
    w = -p
  end where
  do i = 2, n
    w(i) = w(i) + 0.5*w(i-1)
  end do
  out = w*dble(z) + aimag(z)
end subroutine
