# A guest that does to its VMM what no kernel does, and then ends in the way that ENDING says. An exit takes 0.1 ms under emulation,
# so the endings share the work. 0: every port, every device register, doorbells, the serial line; then powers off. 1: only a triple
# fault. 2: the serial line; then halts for ever.
# A PVH kernel: 32 bits, flat, no paging. as --64 --defsym ENDING=0; ld -Ttext=0x100000
.code32
.globl _start
_start:
.if ENDING == 0
# Every port, in every width, in both directions. Writing zero resets nothing and switches nothing off.
    xor %edx, %edx
1:  xor %eax, %eax
    out %al, %dx
    out %ax, %dx
    out %eax, %dx
    in %dx, %al
    in %dx, %ax
    in %dx, %eax
    inc %edx
    cmp $0x1000, %edx
    jb 1b
# Repeated reads, which reach the VMM as one exit: of the serial line, and of a port without a device.
    cld
    mov $0x200000, %edi
    mov $0x3f8, %edx
    mov $2000, %ecx
    rep insb
    mov $0xfff, %edx
    mov $2000, %ecx
    rep insl
# Every register of three virtio windows, complete and in part, in every state of the device.
    xor %ecx, %ecx
2:  mov $0xd0000000, %ebx
3:  mov status(, %ecx, 4), %eax
    mov %eax, 0x70(%ebx)
    xor %edi, %edi
4:  movl $0xffffffff, (%ebx, %edi)
    movl $0x80000001, (%ebx, %edi)
    movb $0x7f, 1(%ebx, %edi)
    movl $0, (%ebx, %edi)
    mov (%ebx, %edi), %eax
    movw 2(%ebx, %edi), %ax
    mov status(, %ecx, 4), %eax
    mov %eax, 0x70(%ebx)
    add $4, %edi
    cmp $0x110, %edi
    jb 4b
    add $0x1000, %ebx
    cmp $0xd0003000, %ebx
    jb 3b
    inc %ecx
    cmp $5, %ecx
    jb 2b
# Doorbells of existing and missing queues.
    mov $5000, %ecx
5:  mov %ecx, %eax
    and $3, %eax
    mov %eax, 0xd0000050
    mov %eax, 0xd0001050
    loop 5b
.endif
.if ENDING != 1
# The serial line.
    mov $0x3f8, %edx
    mov $0x78, %al
    mov $5000, %ecx
6:  out %al, %dx
    loop 6b
.endif
.if ENDING == 0
    mov $0x600, %edx
    mov $0x34, %al
    out %al, %dx
.elseif ENDING == 1
    lidt nothing
    ud2
.endif
7:  cli
    hlt
    jmp 7b
# Nothing, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
status: .long 0, 1, 3, 0xb, 0xf
nothing: .long 0, 0
# XEN_ELFNOTE_PHYS32_ENTRY
.section .note.Xen, "a", @note
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start
