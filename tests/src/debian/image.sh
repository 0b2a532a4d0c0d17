#!/bin/sh
# image.sh BASE OUT AGENT: lays a VM's own files and the agent's package over the root BASE, and makes OUT/disk.ext4 of it. Run in a mount
# namespace, whose mounts end with this.
set -eu
base=$1 out=$2 agent=$3 root=$2/root

# The package finds the init system by itself. Nothing starts in a root that is not booted.
install_agent() {
    mount -t proc proc "$root/proc"
    cp "$agent" "$root/tmp/adit-guest.deb"
    chroot "$root" dpkg -i /tmp/adit-guest.deb
    chroot "$root" adit-guest install --root / --vm-id web-1 --allow-port 22,80,443,8765,9100
    umount "$root/proc"
}

mkdir -p "$out/over" "$root"
mount -t tmpfs -o mode=755 tmpfs "$out/over"
mkdir "$out/over/upper" "$out/over/work"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$out/over/upper,workdir=$out/over/work" "$root"
mount -t tmpfs tmpfs "$root/tmp"

echo web-1 > "$root/etc/hostname"
printf '127.0.0.1 localhost web-1\n::1 localhost\n' > "$root/etc/hosts"
echo '/dev/vda / ext4 defaults,errors=remount-ro 0 1' > "$root/etc/fstab"
: > "$root/etc/machine-id"
rm -f "$root"/etc/systemd/system/timers.target.wants/*

[ ! -d "$root/etc/network" ] || printf 'auto lo\niface lo inet loopback\n' > "$root/etc/network/interfaces"

# What is in it to be reached: ssh, nginx with files, uploads, trailers, git and TLS, a WebSocket, the node exporter.
[ -f "$out/id_ed25519" ] || ssh-keygen -q -t ed25519 -N '' -C test -f "$out/id_ed25519"
chroot "$root" useradd -m -s /bin/bash deploy
for home in root home/deploy; do
    mkdir -p -m 700 "$root/$home/.ssh"
    cp "$out/id_ed25519.pub" "$root/$home/.ssh/authorized_keys"
done
chroot "$root" chown -R deploy: /home/deploy/.ssh
echo 'deploy ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/deploy"
echo 'ListenAddress 127.0.0.1' > "$root/etc/ssh/sshd_config.d/local.conf"
chroot "$root" openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=web-1 -addext 'subjectAltName=DNS:web-1' \
    -keyout /etc/nginx/web-1.key -out /etc/nginx/web-1.crt 2> /dev/null
cp "$root/etc/nginx/web-1.crt" "$out/web-1.crt"
www=$root/var/www/html
echo 'this is web-1' > "$www/index.html"
rm -f "$www/index.nginx-debian.html"
mkdir "$root/var/www/up"
chroot "$root" chown www-data: /var/www/up
cat > "$root/etc/nginx/sites-available/default" <<'END'
server {
    listen 127.0.0.1:80;
    listen 127.0.0.1:443 ssl;
    server_name web-1;
    ssl_certificate /etc/nginx/web-1.crt;
    ssl_certificate_key /etc/nginx/web-1.key;
    root /var/www/html;
    location /up/ { root /var/www; dav_methods PUT DELETE; client_max_body_size 0; }
    location /trailers/ { alias /var/www/html/; add_header Trailer Checked; add_trailer Checked yes; }
    location ~ ^/git(/.*)$ {
        client_max_body_size 0;
        include fastcgi_params;
        fastcgi_param SCRIPT_FILENAME /usr/lib/git-core/git-http-backend;
        fastcgi_param GIT_PROJECT_ROOT /srv/git;
        fastcgi_param GIT_HTTP_EXPORT_ALL 1;
        fastcgi_param PATH_INFO $1;
        fastcgi_pass unix:/run/fcgiwrap.socket;
    }
}
END
chroot "$root" sh -e <<'END'
export HOME=/root GIT_CONFIG_GLOBAL=/dev/null
git init -q --bare -b main /srv/git/site.git
git init -q -b main /tmp/site
cd /tmp/site
echo 'a site' > README
git add README
git -c user.name=web -c user.email=web@web-1 commit -q -m 'First'
git push -q /srv/git/site.git main
git config --system --add safe.directory '*'
END
cat > "$root/usr/local/bin/echo-websocket" <<'END'
#!/usr/bin/python3
import asyncio, websockets
async def echo(socket, path):
    async for message in socket:
        await socket.send(message)
async def main():
    async with websockets.serve(echo, "127.0.0.1", 8765):
        await asyncio.Future()
asyncio.run(main())
END
chmod 755 "$root/usr/local/bin/echo-websocket"
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
printf '[Service]\nExecStart=/usr/local/bin/echo-websocket\nDynamicUser=yes\n[Install]\nWantedBy=multi-user.target\n' \
    > "$root/etc/systemd/system/echo-websocket.service"
ln -sf ../echo-websocket.service "$root/etc/systemd/system/multi-user.target.wants/echo-websocket.service"

install_agent

cp "$root"/boot/vmlinuz-* "$out/vmlinuz"
cp "$root"/boot/initrd.img-* "$out/initrd"
umount "$root/tmp"
truncate -s 3G "$out/disk.ext4.part"
mke2fs -q -F -t ext4 -d "$root" "$out/disk.ext4.part"
mv "$out/disk.ext4.part" "$out/disk.ext4"
